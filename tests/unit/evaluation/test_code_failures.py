"""Classes of generated code, found without running it."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.evaluation.probes import probes
from actors.evaluation.probes.code_failures import (
    CLASSES,
    balanced,
    classify,
    extract_code,
    program_of,
    undefined_names,
)
from actors.evaluation.sandbox.runner import run_program

SIGNATURE = 'def area(width, height):\n    """Area of a rectangle."""\n'
FENCED = "Here it is:\n\n```python\n{}\n```\nDone."


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("    return width * height\n", "clean"),
        (FENCED.format("def area(width, height):\n    return width * height"), "clean"),
        (FENCED.format("import math\nprint(math.pi)"), "clean"),
        ("    return '(' + str(width)  # :-(\n", "clean"),
        ("    return (width * height\n", "unbalanced_parentheses"),
        ("    return [width * height)\n", "unbalanced_parentheses"),
        ("    return width * height)\n", "unbalanced_parentheses"),
        ("    return width * depth\n", "undefined_names"),
        (FENCED.format("def area(w: List[int]):\n    return w"), "undefined_names"),
        ("    return width * height height\n", "other_syntax"),
        ("  return width\n", "other_syntax"),
        ("    return width\nreturn height\n", "other_syntax"),
        ("    return 'width\n", "other_syntax"),
        ("    return '\0'\n", "other_syntax"),
        ("Here is the function you asked for.", "other_syntax"),
        ("```python (return width)```", "malformed_fences"),
        ("```python\n    return width\n", "malformed_fences"),
        ("    return width\n```", "malformed_fences"),
        ("```python\nx = 1``` and so on\n", "malformed_fences"),
    ],
)
def test_classes(response: str, expected: str) -> None:
    assert classify(response, SIGNATURE) == expected
    assert expected in CLASSES


FUNCTION = "def area(width, height):\n    return width * height\n"
QUOTING = '''def area(width, height):
    """Area:

    ```
    area(1, 2)
    ```
    """
    return width * height
'''


def _block(code: str = FUNCTION, info: str = "python", indent: str = "", fence: str = "```") -> str:
    """A fenced block, every line of it indented."""
    lines = [f"{fence}{info}", *code.splitlines(), fence]
    return "".join(f"{indent}{line}\n" for line in lines)


BLOCKS = {
    "alone": (_block(), "clean"),
    "after a line": ("Here:\n" + _block(), "clean"),
    "with Windows line ends": (_block().replace("\n", "\r\n"), "clean"),
    "without a last line end": (_block().rstrip(), "clean"),
    "spaces after its fences": (_block().replace("```\n", "```  \n"), "clean"),
    "indented by one": (_block(indent=" "), "clean"),
    "indented by two": (_block(indent="  "), "clean"),
    "indented by three": (_block(indent="   "), "clean"),
    "indented by four": (_block(indent="    "), "clean"),
    "indented by a tab": (_block(indent="\t"), "clean"),
    "only its fences indented": (f"  ```python\n{FUNCTION}  ```\n", "clean"),
    "its end indented otherwise": (f"```python\n{FUNCTION}   ```\n", "clean"),
    "in a list": ("1. The function:\n\n" + _block(indent="   ") + "2. Done.\n", "clean"),
    "in a list of a list": ("- One\n  - Two\n\n" + _block(indent="      "), "clean"),
    "begun by a bullet": ("- " + _block(indent="  ").lstrip(), "clean"),
    "begun by a number": ("12. " + _block(indent="    ").lstrip(), "clean"),
    "in a quotation": (_block(indent="> "), "clean"),
    "in a quotation without spaces": (_block(indent=">"), "clean"),
    "in a list, less indented than its end": (
        "- x\n\n  ```python\n  def area(w, h):\n      return w * h\n```\n", "clean"
    ),
    "with a wrong body": (_block("def area(w, h):\nreturn w * h\n", indent="   "), "other_syntax"),
    "without a language": (_block(info=""), "clean"),
    "capitals": (_block(info="Python"), "clean"),
    "py": (_block(info="py"), "clean"),
    "python3": (_block(info="python3"), "clean"),
    "a space before the language": (_block(info=" python"), "clean"),
    "a title": (_block(info='python title="area.py"'), "clean"),
    "line numbers": (_block(info="python {linenos=true hl_lines=[1]}"), "clean"),
    "a file": (_block(info="python:area.py"), "clean"),
    "Pandoc's attributes": (_block(info="{.python .numberLines}"), "clean"),
    "R Markdown's": (_block(info="{python, echo=FALSE}"), "clean"),
    "a shell's before": (_block("pip install x", "bash") + _block(), "clean"),
    "a console's before, ours not named": (_block("$ pip install x", "console") + _block(info=""), "clean"),
    "an output after": (_block() + _block("6 6", ""), "clean"),
    "an output before": (_block("6 6", "") + _block(), "clean"),
    "two, the second wrong": (_block() + _block("x = ("), "clean"),
    "two, the first wrong": (_block("x = (") + _block(), "unbalanced_parentheses"),
    "C++": (_block("int main() { return 0; }", "c++"), "other_syntax"),
    "C# before": (_block("int x = 0;", "c#") + _block(), "clean"),
    "pytorch is not Python": (_block("x y", "pytorch") + _block(), "clean"),
    "tildes": (_block(fence="~~~"), "clean"),
    "backticks within tildes": (_block(QUOTING, fence="~~~"), "clean"),
    "tildes with backticks in the info": (_block(info="python `x`", fence="~~~"), "clean"),
    "four backticks": (_block(fence="````"), "clean"),
    "three within four": (_block('x = """\n```\n"""', fence="````"), "clean"),
    "a longer end": (f"```python\n{FUNCTION}`````\n", "clean"),
    "a shorter end": (f"````python\n{FUNCTION}```\n", "malformed_fences"),
    "an end of the other kind": (f"```python\n{FUNCTION}~~~\n", "malformed_fences"),
    "an end that says something": (f"```python\n{FUNCTION}``` Done.\n", "malformed_fences"),
    "a docstring with a block": (_block(QUOTING), "clean"),
    "backticks in a string": (_block('x = "```"'), "clean"),
    "a wrong one in a list": (_block("x = [1", indent="  "), "unbalanced_parentheses"),
    "a name that is not there, in a list": (_block("x = y", indent="  "), "undefined_names"),
    "no code": ("```python\n```\n", "clean"),
    "not closed": (f"```python\n{FUNCTION}", "malformed_fences"),
    "not closed after one that is": (_block() + "```\nand", "malformed_fences"),
    "on one line": ("```python area = 1```", "malformed_fences"),
    "on one line, before a block": ("Use ```area```:\n" + _block(), "malformed_fences"),
    "one line too many": (_block() + "```\n", "malformed_fences"),
    "two backticks are no fence": ("``\nx = 1\n``\n", "other_syntax"),
}  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_a_fenced_block(block: str) -> None:
    response, expected = BLOCKS[block]
    assert classify(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", "cut_off"),
        (FUNCTION, "cut_off"),
        ("def area(width, hei", "cut_off"),
        ("```python\ndef area(width, hei", "cut_off"),
        ("```pyth", "cut_off"),
        (_block("pip install x", "bash") + "```python\ndef area(width, hei", "cut_off"),
        (_block() + "As you can see,", "clean"),
        (_block() + "As a test:\n```python\nprint(are", "clean"),
        (_block("x = (") + "As you can see,", "unbalanced_parentheses"),
        (_block("x = y") + "As you can see,", "undefined_names"),
        (_block() + "Or ```python x```. And", "malformed_fences"),
    ],
)
def test_what_the_limit_of_tokens_cut_is_no_failure_of_the_model(response: str, expected: str) -> None:
    assert classify(response, finished=False) == expected
    assert classify(response, finished=True) != "cut_off"


def test_the_tests_run_on_the_code_that_was_classified() -> None:
    problem = {"test_list": ["assert area(2, 3) == 6"]}
    answers = {
        _block("pip install x", "bash") + _block(): True,
        _block(indent="   "): True,
        _block(QUOTING, 'python title="x"', fence="````"): True,
        f"```python\n{FUNCTION}": False,
        _block() + _block("6", ""): True,
    }
    for answer, passes in answers.items():
        assert (run_program(program_of(problem, answer)).status == "passed") is passes, answer
    cut = _block() + "For example:\n```python\nprint(are"
    assert run_program(program_of(problem, cut, finished=False)).status == "passed"


def test_code_that_is_nested_too_deeply_is_a_syntax_error() -> None:
    assert classify("x = " + "(" * 5000 + ")" * 5000) == "other_syntax"
    assert classify("x = " + "-" * 200_000 + "1") == "other_syntax"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("print(len(__name__))", set()),
        ("x = y", {"y"}),
        ("def f(a, *b, c=1, **d):\n    return a, b, c, d, e", {"e"}),
        ("def f():\n    g()\ndef g():\n    f()", set()),
        ("def f():\n    global count\n    count = 1\ndef g():\n    return count", set()),
        ("import os.path as p, sys\nfrom math import pi as x\nprint(p, sys, x, os)", {"os"}),
        ("try:\n    pass\nexcept ValueError as e:\n    print(e)", set()),
        ("[i for i in range(3) if (n := i)]\nprint(n)\nprint(i)", {"i"}),
        ("def f():\n    x = 1\n    def g():\n        nonlocal x\n        x += z\n    return g", {"z"}),
        ("class A:\n    size = 1\n    def f(self):\n        return size", {"size"}),
        ("class A:\n    size = 1\n    other = size", set()),
        ("with open('f') as f, g() as h:\n    print(f, h)", {"g"}),
        ("from math import *\nprint(pi)", set()),
        ("lambda x: x + y", {"y"}),
        ("@decorate\ndef f(a: Missing) -> Other: pass", {"decorate", "Missing", "Other"}),
        ("match 1:\n    case [a, *b]: print(a, b)\n    case {'k': v, **rest}: print(v, rest)", set()),
    ],
)  # fmt: skip
def test_undefined_names(code: str, names: set[str]) -> None:
    assert undefined_names(code) == names


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("f(a[1], {2: 3})", True),
        ("(]", False),
        ("x = ')' + \"]\" + '''}\n)''' # (", True),
        (r"x = '\'(' + (1)", True),
        ("x = (1\n'''unclosed )", False),
        (")(", False),
    ],
)
def test_brackets_outside_strings_and_comments(code: str, expected: bool) -> None:
    assert balanced(code) is expected


def test_code_comes_from_the_first_fence() -> None:
    assert extract_code("a\n```py\nx = 1\n```\nb\n```\ny = 2\n```") == "x = 1\n"
    assert extract_code("x = 1") == "x = 1"


def _builtin() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (probes.PROMPTS / "code.jsonl").read_text().splitlines()]


def test_the_built_in_problems_can_be_solved_and_failed() -> None:
    problems = _builtin()
    for problem in problems:
        assert classify(problem["canonical_solution"], problem["prompt"]) == "clean"
        verdict = run_program(program_of(problem, problem["canonical_solution"]))
        assert verdict.status == "passed", (problem["task_id"], verdict)
    assert run_program(program_of(problems[0], "    return None\n")).status == "failed"


def test_mbpp_problems_bring_their_tests_otherwise() -> None:
    problem = {
        "test_imports": ["import math"],
        "test_list": ["assert twice(math.pi) > 6", "assert twice(1) == 2"],
    }
    right = FENCED.format("def twice(x): return 2 * x")
    assert run_program(program_of(problem, right)).status == "passed"
    assert run_program(program_of(problem, "def twice(x): return x")).status == "failed"
    plus = {**problem, "test": "assert twice('a') == 'aa'"}
    assert run_program(program_of(plus, right)).status == "passed"


def test_prompts_are_text_files_of_the_package() -> None:
    assert Path(probes.PROMPTS, "instructions.txt").read_text().count("\n") == 24
