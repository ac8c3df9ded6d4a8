"""Every code block of the documentation: Python runs, YAML is a recipe, commands are ones that exist.

The blocks of a page run in its order, in a folder of their own that holds what a page may speak of: the repository's
recipes, `my-bert` (a fine-tuned model), `train.csv` and `eval.jsonl`, and finished runs at `runs/demo` and
`runs/mrpc-0`, all tiny. A YAML block that begins with a comment such as "# mine.yaml" becomes that file.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

from attnpress.cli import build_parser, main
from attnpress.config import RunConfig
from attnpress.config.recipe import load_config, load_spec
from attnpress.export import KINDS
from attnpress.kernels import cpu
from attnpress.posttraining.measure import Cost
from attnpress.studies.sweep.spec import SweepSpec

ROOT = Path(__file__).parents[2]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
}
QUICK = ("validate", "ls")
"""Commands that are run; the others are parsed, and their recipes read. Exports for hardware are made, too."""
EXPORTED = [
    kind
    for kind, about in KINDS.items()
    if kind not in ("onnx", "openvino") and all(map(importlib.util.find_spec, about.packages))
]
OTHERS = {"git", "cd", "python", "tensorboard", "open"}
"""Commands of others that a page may show."""


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of Markdown; directives of the site, in braces, are left to the site's generator."""
    fences = [token for token in MarkdownIt().parse(page) if token.type == "fence"]
    found = [Block(token.info.strip(), token.content, (token.map or [0])[0] + 1) for token in fences]
    return [block for block in found if not block.language.startswith("{")]


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command: comments and continued lines resolved, variables in front left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Refuse a command that does not exist: of attnpress by its own parser, of make and pip by the project's files."""
    if "attnpress.cli" in words:  # torchrun ... -m attnpress.cli ...
        words = ["attnpress", *words[words.index("attnpress.cli") + 1 :]]
    words = list(itertools.dropwhile(lambda word: word.startswith("HOLD_TO="), words))
    if words[0] == "csrc/hold_avx2.sh":
        words = words[1:]
    tool, *rest = words
    if tool == "attnpress":
        check_attnpress(rest)
    elif tool == "make":
        targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), f"no such target: {words}"
    elif tool == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        asked = re.findall(r"(?:attnpress|\.)\[(.*?)\]", " ".join(rest))
        assert {extra for group in asked for extra in group.split(",")} <= set(extras), f"no such extra: {words}"
    else:
        assert tool in OTHERS, f"unknown command: {words}"


def check_attnpress(words: list[str]) -> None:
    """Parse; run what is quick, and read the recipe of what is not."""
    try:
        options = build_parser().parse_args(words)
    except SystemExit as refused:
        raise AssertionError(f"attnpress {shlex.join(words)}: refused by the command line") from refused
    if words[0] in QUICK or (words[0] == "export" and options.to in EXPORTED):
        assert main(words) == 0, f"attnpress {shlex.join(words)}: failed"
    elif words[0] == "compress":
        load_config(options.recipe, options.set)


def check_yaml(text: str, folder: Path) -> None:
    """A recipe, a part of one, or a sweep; kept if it names its file."""
    named = re.match(r"# (\S+\.yaml)\n", text)
    file = folder / (named[1] if named else "part.yaml")
    file.write_text(text, encoding="utf-8")
    if re.search(r"^search:", text, re.MULTILINE):
        load_spec(SweepSpec, file, [])
    else:
        load_config(file)


def run_page(page: str, name: str, folder: Path, names: dict[str, Any]) -> None:
    """Check the blocks of a page in order; its Python blocks share `names`."""
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.text, name, "exec")  # errors show the line of the page
            exec(code, names)
        elif block.language == "yaml":
            check_yaml(block.text, folder)
        elif block.language == "sh":
            for words in commands(block.text):
                check_command(words)
        else:
            assert block.language == "text", f"{name}:{block.line}: say python, yaml, sh or text after the fence"


@pytest.fixture
def folder(finished: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the blocks of one page run."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copytree(finished / "dense", tmp_path / "my-bert")
    shutil.copytree(reviews, tmp_path, dirs_exist_ok=True)
    for name in ("demo", "mrpc-0"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def openvino_model() -> Any:
    """A compiled graph, such as the benchmark page looks into."""
    openvino = pytest.importorskip("openvino")
    x = openvino.opset13.parameter([1, 4], openvino.Type.f32)
    return openvino.Core().compile_model(openvino.Model([openvino.opset13.relu(x)], [x]), "CPU")


def simulators() -> dict[str, Any]:
    """The page of simulators runs them."""
    for name in ("scalesim", "qonnx"):
        pytest.importorskip(name)
    return {}


def compiled(*packages: str) -> Callable[[], dict[str, Any]]:
    """The pages of encoders deploy on the kernel."""

    def provide() -> dict[str, Any]:
        if not cpu.is_built():
            pytest.skip("the CPU kernel is not built: run `make kernel`")
        for name in packages:
            pytest.importorskip(name)
        return {}

    return provide


PROVIDED: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/benchmarks.md": lambda: {"compiled": openvino_model()},
    "docs/howto/hardware.md": simulators,
    "docs/howto/quantize.md": compiled(),
    "docs/howto/sentence-transformers.md": compiled("sentence_transformers"),
}
"""What a page takes from elsewhere; every other page is complete in itself."""


@pytest.mark.filterwarnings("ignore:the CPU kernel is not built")
@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text)])
def test_the_blocks_of_a_page_hold(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CI", "true")  # openvino reports to its makers otherwise
    # Two processes that load libraries, to time models that are too small to gain by it.
    monkeypatch.setattr(
        "attnpress.posttraining.run.costs", lambda *_: (Cost(1.0, 1.0, 1.0), Cost(2.0, 1.0, 1.0), "avx2")
    )
    monkeypatch.setattr(sys, "argv", ["page.py", "runs/demo/export/trace/trace.safetensors"])
    run_page(TEXTS[name], name, folder, PROVIDED.get(name, dict)() | {"__name__": "page"})


def test_documentation_has_blocks_of_each_kind() -> None:
    found = [block.language for text in TEXTS.values() for block in blocks(text)]
    assert {"python", "yaml", "sh"} <= set(found)


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\nimport attnpress\nattnpress.no_such_name\n```", AttributeError),
        ("```yaml\nattention: {sparsity: 1.5}\n```", ValueError),
        ("```sh\nattnpress compress\n```", AssertionError),
        ("```sh\nattnpress validate no-such.yaml\n```", AssertionError),
        ("```sh\nattnpress compress recipes/demo.yaml --output x --set attention.bits=8\n```", ValueError),
        ("```sh\nA=b torchrun --nproc-per-node 2 -m attnpress.cli compress\n```", AssertionError),
        ("```sh\nmake no-such-target\n```", AssertionError),
        ("```sh\npip install 'attnpress[nothing]'\n```", AssertionError),
        ("```sh\nno-such-tool\n```", AssertionError),
        ("1. step\n\n   ```\n   attnpress ls rules\n   ```", AssertionError),
    ],
)
def test_a_block_that_does_not_hold_is_seen(page: str, error: type[Exception], folder: Path) -> None:
    with pytest.raises(error):
        run_page(page, "page", folder, {})


def test_a_named_recipe_can_be_used_by_the_commands_after_it(folder: Path, tiny_recipe: RunConfig) -> None:
    run_page("```yaml\n# own.yaml\nseed: 3\n```\n\n```sh\nattnpress validate own.yaml\n```", "page", folder, {})
    assert load_config(folder / "own.yaml").seed == 3
