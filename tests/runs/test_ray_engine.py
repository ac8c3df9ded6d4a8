"""run --engine ray: the bytes of the local engine, whatever becomes of the workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnpress.config import ConfigError
from attnpress.config.recipe import load_config
from attnpress.runs.prediction import Deployment, run_files
from attnpress.runs.ray_engine import Worker, spread
from tests.runs.prediction_files import write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with ids that say which file and line a row is of."""
    place = tmp_path_factory.mktemp("ray") / "in"
    (place / "deep").mkdir(parents=True)
    for name, count in {"a.jsonl": 3, "b.jsonl": 11, "deep/c.jsonl": 6, "deep/d.jsonl": 1}.items():
        rows = [
            {"review": "good film " * (line % 5), "id": f"{Path(name).stem}-{line}"} for line in range(1, count + 1)
        ]
        write(place / name, [json.dumps(row) for row in rows])
    return place


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.jsonl")
        if not path.name.startswith(".")
    }


@pytest.mark.timeout(900)
def test_a_worker_that_is_killed_loses_and_doubles_nothing(finished: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    local = Deployment(finished, load_config(finished / "recipe.yaml"), "reference", "float", 8)
    run_files(local, [folder], tmp_path / "local", warn=print, notify=print)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
    words = [sys.executable, str(ROOT / "tests" / "runs" / "ray_cluster.py"), str(finished), str(folder), str(tmp_path)]
    ran = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout.splitlines()[-1])

    assert outputs(tmp_path / "killed") == outputs(tmp_path / "local")
    assert said["rerun"].startswith("0\n")
    assert "3 of 4 files are done already\n== 4 of 4 files: a.jsonl, 3 lines\npredicted: 21 lines" in said["rerun"]
    assert said["poisoned"].startswith("1 of 4 files are not answered, the others are: ")
    assert "b.jsonl: 2 workers died on it or on loading the model; out of memory?" in said["poisoned"]
    whole = outputs(tmp_path / "local")
    assert outputs(tmp_path / "poisoned") == {name: whole[name] for name in whole if name != "b.jsonl"}
    chunks = [json.loads(line) for line in (tmp_path / "killed.chunks").read_text("utf-8").splitlines()]
    begun = ["a-1", "b-1", "b-5", "b-5", "b-9", "c-1", "c-5", "d-1"]
    assert sorted(row for _, row in chunks) == begun, "the chunk that was lost is answered again, and nothing else"
    assert len({process for process, _ in chunks}) >= 2


def test_what_keeps_a_worker_from_loading_is_told_of_each_file(finished: Path, tmp_path: Path) -> None:
    row = {"source": str(tmp_path / "a.jsonl"), "output": str(tmp_path / "out" / "a.jsonl")}
    said = Worker(Deployment(tmp_path, None, "reference", "float", 8), str(tmp_path / "absent"), "run")(row)
    assert f"{tmp_path}/absent: No such file or directory" in json.loads(said["outcome"])["reason"]
    said = Worker(Deployment(tmp_path, None, "reference", "float", 8), str(Path.cwd()), "run")(row)
    assert "holds no finished compressed model" in json.loads(said["outcome"])["reason"]
    write(tmp_path / "a.jsonl", ['{"review": "good"}', "{"])
    model = Deployment(finished, load_config(finished / "recipe.yaml"), "reference", "float", 8)
    worker = Worker(model, str(Path.cwd()), "run")
    found = json.loads(worker(row)["outcome"])
    assert (found["progress"]["written"], found["progress"]["skipped"], found["reason"]) == (1, 1, "")
    assert [text.partition("a.jsonl:")[2].split(" (")[0] for text in found["warnings"]] == ["2: not JSON"]


def test_a_file_that_workers_died_of_is_not_tried_for_ever(finished: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ['{"review": "good"}'])
    row = {"source": str(tmp_path / "a.jsonl"), "output": str(tmp_path / "out" / "a.jsonl")}
    note = tmp_path / "out" / ".a.jsonl.tries"
    note.parent.mkdir()

    def reason(run: str) -> str:
        model = Deployment(finished, load_config(finished / "recipe.yaml"), "reference", "float", 8)
        return str(json.loads(Worker(model, str(Path.cwd()), run, tries=2)(row)["outcome"])["reason"])

    note.write_text("first 2", "utf-8")
    assert "2 workers died on it or on loading the model" in reason("first")
    assert not note.exists()
    for other in ("first 1", "before 2", "damaged", ""):
        note.write_text(other, "utf-8")
        assert reason("first") == ""
    assert not note.exists()


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--engine ray needs Ray Data: pip install 'attnpress\[ray\]'"):
        spread(Deployment(tmp_path, None, "reference", "float", 8))
