"""The house rules, read off the source: arrows, fences, names, sizes, safe loading.

Every rule is a function that lists offences. One test asks it about the project, and the tables show it code that
breaks the rule and code that keeps it, so that no rule can fall silent.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.arrows import PACKAGE, SOURCE, Modules, first, imported_names, own_modules, read_modules

ROOT = Path(__file__).parents[1]
ARROWS: dict[str, set[str]] = {
    "config": set(),
    "locks": set(),
    "files": {"locks"},
    "distributed": set(),
    "records": set(),
    "core": {"config"},
    "report": {"records"},
    "kernels": {"config", "core"},
    "models": {"config", "core", "files", "kernels"},
    "tasks": {"config", "records", "distributed", "models"},
    "deployment": {"config", "core", "models", "kernels", "tasks"},
    "training": {"config", "core", "distributed", "models", "tasks"},
    "runs": {
        *("config", "files", "locks", "distributed", "records", "core", "models", "kernels", "tasks", "deployment"),
        "training",
    },
    "export": {"config", "files", "records", "core", "models", "kernels", "tasks", "deployment", "runs"},
    "benchmark": {"config", "files", "records", "core", "models", "kernels", "deployment", "training", "runs"},
    "studies": {"config", "files", "locks", "records", "core", "models", "tasks", "training", "runs"},
    "posttraining": {
        *("config", "files", "records", "core", "models", "kernels", "tasks", "deployment", "training", "runs"),
        "benchmark",
    },
    "cli": {
        *("__init__", "config", "files", "distributed", "records", "report", "models", "kernels", "tasks", "training"),
        *("runs", "export", "benchmark", "studies", "posttraining"),
    },
    "__init__": {"config", "models", "deployment", "training", "runs", "posttraining"},
}
"""What each part of the package may import of the others; a part's own modules are always allowed."""

FENCES: dict[str, tuple[str, ...]] = {
    "transformers": ("models", "tasks", "training", "runs", "export", "studies", "benchmark.stock"),
    "datasets": ("tasks",),
    "matplotlib": ("report.plots",),
    "optuna": ("studies.sweep",),
    "triton": ("kernels.triton",),
    "nncf": ("benchmark",),
    "onnxruntime": ("export", "benchmark"),
    "openvino": ("export", "benchmark"),
    "qonnx": ("export",),
    "ray": ("runs.ray_engine",),
    "scalesim": ("export",),
}
"""The only places that may know a library."""

EMPTY_NAMES = {"util", "common", "helper", "manager", "handler", "mixin"}
UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_LOADS = {"torch.load", "numpy.load", "pandas.read_pickle"}
FUNCTION_LINES, USUAL_LINES, LONGISH_SHARE = 60, 35, 0.1

Rule = Callable[[Modules], list[str]]


def imported_libraries(module: str, source: str) -> list[str]:
    return sorted({first(name) for name in imported_names(module, source)} - {PACKAGE})


def wrong_arrows(modules: Modules) -> list[str]:
    offences = []
    for module, source in modules.items():
        if first(module) not in ARROWS:
            offences.append(f"{module}: no place in the layout; give {first(module)!r} a row in ARROWS, or move it")
            continue
        own = [name.split(".") for name in imported_names(module, source) if first(name) == PACKAGE]
        targets = {path[1] if len(path) > 1 and path[1] in ARROWS else "__init__" for path in own}
        wrong = sorted(targets - ARROWS[first(module)] - {first(module)})
        offences += [f"{module}: must not import {target}" for target in wrong]
    return offences


def import_cycles(modules: Modules) -> list[str]:
    graph = {module: own_modules(module, modules) - {module} for module in modules}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def broken_fences(modules: Modules) -> list[str]:
    return [
        f"{module}: {library} may be imported in {', '.join(FENCES[library])} only"
        for module, source in modules.items()
        for library in imported_libraries(module, source)
        if library in FENCES and not any(f"{module}.".startswith(f"{place}.") for place in FENCES[library])
    ]


def foreign_to_core(modules: Modules) -> list[str]:
    return [
        f"{module}: core imports torch only, found {library}"
        for module, source in modules.items()
        if first(module) == "core"
        for library in imported_libraries(module, source)
        if library != "torch" and library not in sys.stdlib_module_names
    ]


def empty_names(modules: Modules) -> list[str]:
    names = [(module, module) for module in modules]
    for module, source in modules.items():
        names += [(module, node.name) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [f"{module}: {name} does not say what it is" for module, name in names if words(name) & EMPTY_NAMES]


def words(name: str) -> set[str]:
    return {word.lower().rstrip("s") for word in re.findall(r"[A-Z]?[a-z]+", name)}


def long_functions(modules: Modules) -> list[str]:
    lengths = function_lengths(modules)
    return [f"{name}: {count} lines, at most {FUNCTION_LINES}" for name, count in lengths if count > FUNCTION_LINES]


def too_many_longish_functions(modules: Modules) -> list[str]:
    lengths = function_lengths(modules)
    longish = [f"{name}: {count} lines" for name, count in lengths if count > USUAL_LINES]
    return longish if len(longish) > LONGISH_SHARE * len(lengths) else []


def function_lengths(modules: Modules) -> list[tuple[str, int]]:
    """Lines of every function, docstring not counted: explaining is free."""
    lengths = []
    for module, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                explained = line_count(node.body[0]) if ast.get_docstring(node) is not None else 0
                lengths.append((f"{module}:{node.lineno} {node.name}", line_count(node) - explained))
    return lengths


def line_count(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def unsafe_loads(modules: Modules) -> list[str]:
    """Whatever can run code that hides in a file: unpicklers, and loaders that fall back on one."""
    offences = []
    for module, source in modules.items():
        tree, names = ast.parse(source), set(imported_names(module, source))
        used = names | {spelled_out(node, aliases(tree)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        unsafe = (used & UNSAFE_LOADS) | {name for name in names if first(name) in UNPICKLERS}
        offences += [f"{module}: {name} can run what it reads; use safetensors or JSON" for name in sorted(unsafe)]
    return offences


def aliases(tree: ast.Module) -> dict[str, str]:
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {alias.asname: alias.name for alias in imports if alias.asname}


def spelled_out(node: ast.Attribute, known: Mapping[str, str]) -> str:
    head, _, rest = ast.unparse(node).partition(".")
    return f"{known.get(head, head)}.{rest}"


HEAVY = "import sys, attnpress.cli; print(*{'torch', 'transformers', 'datasets'} & sys.modules.keys())"


def long_function(count: int) -> str:
    return "def f():\n    '''Says\n    what.'''\n" + "    g()\n" * (count - 1)


BREAKS: list[tuple[Rule, Modules]] = [
    (wrong_arrows, {"core.pruner": "from attnpress.models import binding"}),
    (wrong_arrows, {"core.pruner": "from ..models.binding import bind"}),
    (wrong_arrows, {"kernels.ops": "def f():\n    import attnpress.models.hub"}),
    (wrong_arrows, {"core.cost": "import importlib\nimportlib.import_module('attnpress.kernels.cpu')"}),
    (wrong_arrows, {"records.run": "from attnpress.config import RunConfig"}),
    (wrong_arrows, {"report.render": "from attnpress.core import cost"}),
    (wrong_arrows, {"tasks": "from attnpress import cli"}),
    (wrong_arrows, {"tasks": "from attnpress import bind"}),
    (wrong_arrows, {"elsewhere": ""}),
    (wrong_arrows, {"training.trainer": "from attnpress.runs import compression"}),
    (import_cycles, {"runs": "from attnpress import export", "export": "from attnpress.runs import finished"}),
    (import_cycles, {"core.__init__": "from .cost import macs", "core.cost": "from attnpress.core import macs"}),
    (broken_fences, {"cli": "def main():\n    import transformers"}),
    (broken_fences, {"models_of_mine": "import transformers.models"}),
    (broken_fences, {"runs.evaluation": "from datasets import load_dataset"}),
    (broken_fences, {"report.render": "import matplotlib.pyplot as plt"}),
    (foreign_to_core, {"core.pruner": "import numpy as np"}),
    (empty_names, {"core.attention_utils": ""}),
    (empty_names, {"helpers.text": ""}),
    (empty_names, {"training.trainer": "class RunManager: pass"}),
    (long_functions, {"tasks": long_function(FUNCTION_LINES + 1)}),
    (too_many_longish_functions, {"tasks": long_function(USUAL_LINES + 1) + long_function(3) * 8}),
    (unsafe_loads, {"records.run": "import pickle\npickle.load(file)"}),
    (unsafe_loads, {"records.run": "from pickle import loads"}),
    (unsafe_loads, {"training.trainer": "import torch as t\nt.load(path)"}),
    (unsafe_loads, {"training.trainer": "from torch import load"}),
]

KEEPS: list[tuple[Rule, Modules]] = [
    (wrong_arrows, {"tasks": "from attnpress.models import hub", "core.pruner": "from .quantizer import scale"}),
    (import_cycles, {"core.__init__": "", "core.cost": "from attnpress.core import pruner", "core.pruner": ""}),
    (broken_fences, {"models.hub": "import transformers", "report.plots": "import matplotlib"}),
    (foreign_to_core, {"core.pruner": "import math\nimport torch.nn.functional as F\nfrom attnpress import config"}),
    (empty_names, {"training.trainer": "class CommonsenseTask: pass"}),
    (long_functions, {"tasks": long_function(FUNCTION_LINES)}),
    (too_many_longish_functions, {"tasks": long_function(USUAL_LINES + 1) + long_function(3) * 9}),
    (unsafe_loads, {"records.run": "import json, torch\njson.load(file)\ntorch.library.Library"}),
]


@pytest.mark.parametrize(("rule", "source"), BREAKS)
def test_rule_sees_an_offence(rule: Rule, source: Modules) -> None:
    assert rule(source)


@pytest.mark.parametrize(("rule", "source"), KEEPS)
def test_rule_accepts_what_keeps_it(rule: Rule, source: Modules) -> None:
    assert rule(source) == []


CODE_RULES: list[Rule] = [
    wrong_arrows,
    import_cycles,
    broken_fences,
    foreign_to_core,
    empty_names,
    long_functions,
    too_many_longish_functions,
    unsafe_loads,
]


@pytest.mark.parametrize("rule", CODE_RULES, ids=lambda rule: rule.__name__)
def test_code_keeps(rule: Rule) -> None:
    modules = read_modules(SOURCE)
    assert "files" in modules, "the package's source was not found: the rule would hold for nothing"
    offences = rule(modules)
    assert not offences, "\n".join(offences)


def test_command_line_starts_without_heavy_libraries() -> None:
    fresh = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=False)
    assert (fresh.returncode, fresh.stdout.strip()) == (0, ""), fresh.stderr


def test_public_names_are_not_hidden_by_modules() -> None:
    code = (
        "import attnpress, pkgutil\n"
        "for module in pkgutil.iter_modules(attnpress.__path__, 'attnpress.'):\n"
        "    __import__(module.name)\n"
        "hidden = [name for name in attnpress.__all__ if type(getattr(attnpress, name)).__name__ == 'module']\n"
        "assert not hidden, hidden"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
