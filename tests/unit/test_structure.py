"""Rules of the source's structure that import-linter cannot hold."""

import ast
from pathlib import Path

from tools.structure import circles, import_graph, module_name

ROOT = Path(__file__).parents[2]
FILES = sorted(file for name in ("actors", "orchestrator") for file in (ROOT / name).rglob("*.py"))


def test_no_module_imports_itself_through_others() -> None:
    modules = {module_name(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in FILES}
    assert circles(import_graph(modules, in_functions=False)) == []
    assert circles(import_graph(modules, in_functions=True)) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]


def test_private_parts_of_ray_are_used_in_one_file() -> None:
    files = [str(file.relative_to(ROOT)) for file in FILES if "ray._private" in file.read_text()]
    assert files == ["orchestrator/execution/cluster.py"]
