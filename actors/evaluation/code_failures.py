"""What is wrong with generated code, found by parsing alone; nothing is executed.

The classes are those of *Limits of Layer Pruning*, §3.3 and Fig. 4(b).
"""

import builtins
import re
import symtable
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

MALFORMED_FENCES = "malformed_fences"
UNBALANCED = "unbalanced_parentheses"
UNDEFINED = "undefined_names"
OTHER_SYNTAX = "other_syntax"
CLEAN = "clean"
CLASSES = (MALFORMED_FENCES, UNBALANCED, UNDEFINED, OTHER_SYNTAX, CLEAN)

_FENCE = re.compile(r"^[ \t]*```[ \t]*\w*[ \t]*$", re.MULTILINE)
_LITERAL = re.compile(
    r"""'''.*?(?:'''|\Z)|\"\"\".*?(?:\"\"\"|\Z)|'(?:\\.|[^'\\\n])*'?|"(?:\\.|[^"\\\n])*"?|\#[^\n]*""",
    re.DOTALL,
)
_CLOSES = {")": "(", "]": "[", "}": "{"}
_KNOWN = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__", "__builtins__", "__annotations__"}


def classify(response: str, before: str = "") -> str:
    """The one of `CLASSES` that a response belongs to: the first that applies, in their order.

    `before` is code that the response goes on from (a signature with its
    docstring), parsed together with it. Other syntax errors come before undefined
    names where code does not parse, as names are only looked up where it does.
    """
    code = extract_code(response)
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


def extract_code(response: str) -> str | None:
    """The code of a response: that of its first fenced block, or all of it if it has no fence.

    None if the fences are malformed: not alone on their line, or an odd number.
    """
    fences = list(_FENCE.finditer(response))
    if len(fences) != response.count("```") or len(fences) % 2:
        return None
    return response[fences[0].end() + 1 : fences[1].start()] if fences else response


def balanced(code: str) -> bool:
    """Whether all (), [] and {} outside strings and comments are paired."""
    opened: list[str] = []
    for letter in _LITERAL.sub("", code):
        if letter in _CLOSES.values():
            opened.append(letter)
        elif letter in _CLOSES and (not opened or opened.pop() != _CLOSES[letter]):
            return False
    return not opened


def undefined_names(code: str) -> set[str]:
    """Names that are read somewhere and bound nowhere where Python would look for them.

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


def program_of(problem: Mapping[str, Any], response: str) -> str:
    """A response with the tests of its problem, ready to run.

    Args:
        problem: a row of HumanEval(+) (`prompt`, `entry_point`, `test`), whose prompt
            the code goes on from, or of MBPP(+) (`test_list`, and `test` or
            `test_imports` where it has them).
        response: code, fenced or not; with malformed fences it is taken as it stands.
    """
    code = extract_code(response)
    code = response if code is None else code
    if "entry_point" in problem:
        return f"{problem['prompt']}{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    imports = problem.get("test_imports") or []
    tests = problem.get("test") or "\n".join([*imports, *problem["test_list"]])
    return f"{code}\n\n{tests}\n"
