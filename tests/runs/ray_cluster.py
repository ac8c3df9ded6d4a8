"""A program that runs a folder on a Ray cluster of two nodes on this machine, and loses a worker on the way.

Usage: python ray_cluster.py RUN_DIR INPUT FOLDER. The answers of the run whose worker is killed go to FOLDER/killed;
FOLDER/killed.chunks tells which process has begun which chunk of rows. FOLDER/poisoned is of a file that kills every
worker. The last line printed holds what each said.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from attnpress.cli import main
from attnpress.config.recipe import load_config
from attnpress.runs import ray_engine, row_files
from attnpress.runs.prediction import Deployment, run_files
from attnpress.runs.row_files import Answer, PredictionError, Row

CHUNK, KILLED = 4, "b-5"
"""Rows at once, and the row that costs a worker its life: the first of the second chunk of b.jsonl."""


@dataclass(frozen=True)
class Dying(Deployment):
    """A model that kills its process once, or always."""

    place: Path = Path()
    name: str = ""
    always: bool = False

    def load(self) -> Answer:
        row_files.CHUNK = CHUNK
        answer = super().load()

        def dying(rows: Sequence[Row]) -> Sequence[Any]:
            with (self.place / f"{self.name}.chunks").open("a") as file:
                file.write(json.dumps([os.getpid(), rows[0]["id"]]) + "\n")
            flag = self.place / "flag"
            if rows[0]["id"] == KILLED and (self.always or not flag.exists()):
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return answer(rows)

        return dying


def command(folder: Path, source: Path, output: Path) -> str:
    """What the command prints."""
    said = io.StringIO()
    words = ["run", str(folder), "--backend", "reference", "--input", str(source), "--output", str(output)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([*words, "--engine", "ray", "--workers", "2"])
    return f"{status}\n{said.getvalue()}"


def program(folder: Path, source: Path, place: Path) -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # no one to report to; none to yield to
    head: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    config, said = load_config(folder / "recipe.yaml"), dict[str, str]()

    def run(name: str, always: bool = False) -> None:
        dying = Dying(folder, config, "reference", "float", 8, place=place, name=name, always=always)
        engine = ray_engine.spread(dying, workers=2)
        run_files(dying, [source], place / name, warn=print, notify=print, engine=engine)

    run("killed")
    (place / "killed" / "a.jsonl").unlink()
    said["rerun"] = command(folder, source, place / "killed")
    ray_engine.TRIES = 2
    try:
        run("poisoned", always=True)
    except PredictionError as error:
        said["poisoned"] = str(error)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(said))


if __name__ == "__main__":
    program(*map(Path, sys.argv[1:]))
