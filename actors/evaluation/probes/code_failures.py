"""Faults of generated code, found by parsing alone; nothing is executed.

The classes are those of *Limits of Layer Pruning*, §3.3 and Fig. 4(b).
"""

import builtins
import re
import symtable
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MALFORMED_FENCES = "malformed_fences"
UNBALANCED = "unbalanced_parentheses"
UNDEFINED = "undefined_names"
OTHER_SYNTAX = "other_syntax"
CLEAN = "clean"
CUT_OFF = "cut_off"
CLASSES = (MALFORMED_FENCES, UNBALANCED, UNDEFINED, OTHER_SYNTAX, CLEAN, CUT_OFF)

_OPENING = re.compile(
    r"(?P<indent>[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+|>[ \t]*)*)"
    r"(?P<fence>`{3,}(?=[^`]*$)|~{3,})[\s{.]*(?:language-)?(?P<language>[\w+#]*)"
)
"""A line that begins a block, at any depth of lists and quotations; no backtick follows one of backticks."""

_PYTHON = re.compile(r"i?py(thon)?[23]?", re.IGNORECASE)
_LITERAL = re.compile(
    r"""'''.*?(?:'''|\Z)|\"\"\".*?(?:\"\"\"|\Z)|'(?:\\.|[^'\\\n])*'?|"(?:\\.|[^"\\\n])*"?|\#[^\n]*""",
    re.DOTALL,
)
_CLOSES = {")": "(", "]": "[", "}": "{"}
_KNOWN = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__", "__builtins__", "__annotations__"}


@dataclass(frozen=True)
class Block:
    """A fenced block of code: the language that its fence names, or "", and whether a fence closes it."""

    language: str
    code: str
    closed: bool


def classify(response: str, before: str = "", finished: bool = True) -> str:
    """Return the one of `CLASSES` that a response belongs to: the first that applies, in their order.

    A response that the limit of tokens ended, so that it is not `finished`, is
    `CUT_OFF` unless its code was closed by a fence before: how it would continue is
    unknown. `before` is code that the response continues (a signature with its
    docstring), parsed together with it. Other syntax errors come before undefined
    names where code does not parse, as names are only looked up where it does.
    """
    blocks, _ = fenced_blocks(response)
    if not finished and not any(block.closed for block in _solution_blocks(blocks)):
        return CUT_OFF
    code = extract_code(response, finished)
    if code is None:
        return MALFORMED_FENCES
    code = before + code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `"\d"`, `1 is 1`: no concern of ours
            compile(code, "<generated>", "exec")
            undefined = undefined_names(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return OTHER_SYNTAX if balanced(code) else UNBALANCED
    return UNDEFINED if undefined else CLEAN


def extract_code(response: str, finished: bool = True) -> str | None:
    """Return the code of a response: its first block in Python, or all of it if it has no block.

    Where no fence names Python, it is the first block that names no language, or else
    the first. None if the fences are malformed: backticks of a fence outside any
    block, or a block that nothing closes and that no limit has cut.
    """
    blocks, stray = fenced_blocks(response)
    if stray or (finished and not all(block.closed for block in blocks)):
        return None
    return next((block.code for block in _solution_blocks(blocks)), response)


def fenced_blocks(response: str) -> tuple[list[Block], bool]:
    """Return the fenced blocks of Markdown text, and true if backticks of a fence stand outside them.

    As CommonMark has it (§4.5): a block is closed by a line of as many of the same
    characters, indented less than four columns more than its beginning, or by the end
    of the text; its lines lose the indentation of the beginning. Unlike there, a
    block may begin at any indentation, as it may in a list; lists are not tracked.
    """
    blocks: list[Block] = []
    stray, opening, code = False, None, ""
    for line in response.splitlines(keepends=True):
        if opening is None:
            opening, code = _OPENING.match(line), ""
            stray = stray or (opening is None and "```" in line)
            continue
        lead = rf"[ \t{'>' if '>' in opening['indent'] else ''}]{{0,%d}}"
        width, fence = len(opening["indent"]), opening["fence"]
        if re.match(lead % (width + 3) + fence + fence[0] + r"*\s*$", line):
            blocks.append(Block(opening["language"], code, closed=True))
            opening = None
        else:
            code += re.sub("^" + lead % width, "", line)
    if opening is not None:
        blocks.append(Block(opening["language"], code, closed=False))
    return blocks, stray


def _solution_blocks(blocks: list[Block]) -> list[Block]:
    """Return the block with the solution, if any: a shell's may stand before it, an output after it."""
    python = [block for block in blocks if _PYTHON.fullmatch(block.language)]
    return [*python, *(block for block in blocks if not block.language), *blocks][:1]


def balanced(code: str) -> bool:
    """Return true if all (), [] and {} outside strings and comments are paired."""
    opened: list[str] = []
    for letter in _LITERAL.sub("", code):
        if letter in _CLOSES.values():
            opened.append(letter)
        elif letter in _CLOSES and (not opened or opened.pop() != _CLOSES[letter]):
            return False
    return not opened


def undefined_names(code: str) -> set[str]:
    """Return names that are read somewhere and bound nowhere where Python would look for them.

    A name counts as bound if any statement of its scope binds it, in whatever
    order. After `from x import *`, every name may be bound, and none is given.

    Raises SyntaxError if `code` does not parse.
    """
    module = symtable.symtable(code, "<generated>", "exec")
    scopes = list(_scopes(module))
    bound = _KNOWN | {
        symbol.get_name()
        for scope in scopes
        for symbol in scope.get_symbols()
        if (symbol.is_assigned() or symbol.is_imported()) and (scope is module or symbol.is_declared_global())
    }
    if re.search(r"^\s*from\s+\S+\s+import\s*\(?\s*\*", code, re.MULTILINE):
        return set()
    read = {
        symbol.get_name()
        for scope in scopes
        for symbol in scope.get_symbols()
        if symbol.is_referenced() and (scope is module or symbol.is_global())
    }
    return read - bound


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def program_of(problem: Mapping[str, Any], response: str, finished: bool = True) -> str:
    """Return a response with the tests of its problem, ready to run.

    Args:
        problem: a row of HumanEval(+) (`prompt`, `entry_point`, `test`), whose prompt
            the code continues, or of MBPP(+) (`test_list`, and `test` or
            `test_imports` where it has them).
        response: code, fenced or not; with malformed fences it is taken as it stands.
        finished: as for `classify`.
    """
    code = extract_code(response, finished)
    code = response if code is None else code
    if "entry_point" in problem:
        return f"{problem['prompt']}{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    imports = problem.get("test_imports") or []
    tests = problem.get("test") or "\n".join([*imports, *problem["test_list"]])
    return f"{code}\n\n{tests}\n"
