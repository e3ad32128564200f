"""Print measures of the code's structure: `python tools/structure.py [ROOT]`; standard library only.

All are taken over the Python files of ROOT/orchestrator and ROOT/actors:

- A private function is a function or method named `_x`, no dunder. It counts as called once if its name is
  referenced exactly once in both packages: every `_x` or `a._x` in an expression is a reference, also
  in its own body; its definition and the import of its name are none. Functions of one name share a count.
- The share is that of all functions and methods, nested ones included.
- An import circle is a strongly connected component of more than one module over the imports at module level
  (inside `if` and `try`, too), without those below `if TYPE_CHECKING`; a second count adds the imports inside
  functions. `from package import module` is an import of the module, not of the package.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGES = ("orchestrator", "actors")
LONGEST_FUNCTION, LONGEST_FILE = 60, 400
QUESTION_WORDS = {"What", "Whether", "How", "Who", "Where", "Why", "When"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.Module) -> list[Function]:
    """Return every function and method, nested ones included."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def references(tree: ast.Module) -> Iterator[str]:
    """Yield the names that expressions refer to, bare or as attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def called_once(trees: Mapping[Path, ast.Module]) -> list[str]:
    """Return the names of private functions that are referenced exactly once."""
    counts = Counter(name for tree in trees.values() for name in references(tree))
    names = [function.name for tree in trees.values() for function in functions_of(tree)]
    return [name for name in names if name.startswith("_") and name[:2] != "__" and counts[name] == 1]


def imports(body: Iterable[ast.AST], in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports below the nodes, without those for type checkers."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(node.orelse, in_functions)
        elif in_functions or not isinstance(node, Function):
            yield from imports(ast.iter_child_nodes(node), in_functions)


def import_graph(modules: Mapping[str, ast.Module], in_functions: bool) -> dict[str, set[str]]:
    """Return the modules that each module imports, at its top level or in functions, too."""
    graph: dict[str, set[str]] = {}
    for name, tree in modules.items():
        targets: set[str] = set()
        for node in imports(tree.body, in_functions):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            else:
                wanted = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= (wanted & modules.keys()) or {node.module or ""}
        graph[name] = targets & modules.keys() - {name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += graph[name]
        reached[start] = seen
    found = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return [list(component) for component in sorted(found)]


def module_name(path: Path) -> str:
    """Return the dotted name under which the file is imported."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def main() -> None:
    """Print every measure for the root that the command line names, by default the current directory."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    texts = {
        file.relative_to(root): file.read_text(encoding="utf-8")
        for package in PACKAGES
        for file in sorted((root / package).rglob("*.py"))
    }
    trees = {path: ast.parse(text) for path, text in texts.items()}
    functions = [(path, function) for path, tree in trees.items() for function in functions_of(tree)]
    print("files per folder (without __init__.py)")
    folders = Counter(str(path.parent) for path in trees if path.name != "__init__.py")
    for folder, count in sorted(folders.items()):
        print(f"  {count:3} {folder}")
    for package in PACKAGES:
        lines = sum(text.count("\n") for path, text in texts.items() if path.parts[0] == package)
        print(f"lines of {package}: {lines}")
    once = called_once(trees)
    print(f"functions: {len(functions)}")
    print(f"private functions called once: {len(once)} = {len(once) / len(functions):.1%}")

    openings = Counter(
        doc.split()[0].rstrip(".,:;") for _, function in functions if (doc := ast.get_docstring(function))
    )
    described = sum(openings.values())
    questions = sum(count for word, count in openings.items() if word in QUESTION_WORDS)
    print(f"docstrings of functions: {described}; {questions / described:.1%} open with a question word")
    print("  first words: " + ", ".join(f"{word} {count}" for word, count in openings.most_common(20)))

    print(f"functions of more than {LONGEST_FUNCTION} lines")
    for path, function in functions:
        if (length := (function.end_lineno or 0) - function.lineno + 1) > LONGEST_FUNCTION:
            print(f"  {length:3} {path}: {function.name}")
    print(f"files of more than {LONGEST_FILE} lines")
    for path, text in texts.items():
        if (length := text.count("\n")) > LONGEST_FILE:
            print(f"  {length:3} {path}")
    modules = {module_name(path): tree for path, tree in trees.items()}
    for label, in_functions in (("", False), (" with those in functions", True)):
        found = circles(import_graph(modules, in_functions))
        print(f"import circles{label}: {len(found)}")
        for component in found:
            print(f"  {len(component)} modules: {', '.join(component)}")


if __name__ == "__main__":
    main()
