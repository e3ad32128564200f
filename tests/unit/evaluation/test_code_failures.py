"""Classes of generated code, found without running it."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.evaluation import probes
from actors.evaluation.code_failures import (
    CLASSES,
    balanced,
    classify,
    extract_code,
    program_of,
    undefined_names,
)
from actors.evaluation.sandbox import run_program

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
        outcome = run_program(program_of(problem, problem["canonical_solution"]))
        assert outcome.status == "passed", (problem["task_id"], outcome)
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
