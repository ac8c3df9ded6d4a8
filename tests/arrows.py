"""Prints which folder of the package imports which, and how large its files are: `make arrows`.

`tests/test_house_rules.py` holds what is printed to the layout of CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import importlib.util
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "attnpress"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

Modules = Mapping[str, str]
"""Source by path below the package, dotted: "files", "core.pruner", "core.__init__"."""


def read_modules(folder: Path = SOURCE) -> dict[str, str]:
    """Every module of the package that lies in a folder."""
    paths = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    return {module: path.read_text("utf-8") for module, path in sorted(paths.items())}


def imported_names(module: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; relative and literal dynamic imports are resolved."""
    package = f"{PACKAGE}.{module}".rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                base = importlib.util.resolve_name("." * level + (origin or ""), package)
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def first(dotted: str) -> str:
    return dotted.partition(".")[0]


def own_modules(module: str, modules: Modules) -> set[str]:
    """The modules that `module` imports: of `attnpress.core.pruner.keep`, that is `core.pruner`."""
    found = set()
    for name in imported_names(module, modules[module]):
        parts = name.split(".")[1:] if first(name) == PACKAGE else []
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        found |= set([known for path in prefixes for known in (path, f"{path}.__init__") if known in modules][:1])
    return found


def arrows(modules: Modules) -> dict[str, set[str]]:
    """The folders, and files beside them, that each of them imports."""
    found: dict[str, set[str]] = {first(module): set() for module in modules}
    for module in modules:
        found[first(module)] |= {first(other) for other in own_modules(module, modules)} - {first(module)}
    return found


def floors(found: Mapping[str, set[str]]) -> dict[str, int]:
    """How many others lie below each on the longest way down; folders that import each other share no floor."""
    known: dict[str, int] = {}
    while len(known) < len(found):
        ready = [name for name in found if name not in known and found[name] <= known.keys()]
        if not ready:
            raise ValueError(f"these import each other: {', '.join(sorted(found.keys() - known.keys()))}")
        known |= {name: 1 + max((known[other] for other in found[name]), default=-1) for name in ready}
    return known


def main(folder: Path) -> None:
    modules = read_modules(folder)
    found = arrows(modules)
    height = floors(found)
    for name in sorted(found, key=lambda name: (-height[name], name)):
        print(f"{height[name]:2} {name:<12} -> {', '.join(sorted(found[name])) or 'nothing'}")
    lines = sorted(source.count("\n") for source in modules.values())
    count, levels = sum(map(len, found.values())), 1 + max(height.values())
    print(f"{len(found)} folders and files at the top, {count} arrows, {levels} floors")
    print(f"{len(lines)} files, longest {lines[-1]} lines, median {statistics.median(lines):.0f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
