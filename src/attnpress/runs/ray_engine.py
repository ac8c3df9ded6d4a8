"""`run --engine ray`: predict the files of a folder on a Ray cluster, with Ray Data.

Each row of the Ray dataset is a file; each worker is an actor that loads the model once. The output folder, shared by
all machines, records what is done. If a worker dies, another one resumes its file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnpress.config import ConfigError
from attnpress.files import explain, write_text
from attnpress.kernels.cpu import BackendUnavailableError
from attnpress.models.checkpoint import ModelError
from attnpress.models.loading import quiet
from attnpress.runs.prediction import Deployment
from attnpress.runs.row_files import PredictionError, Progress
from attnpress.runs.row_folders import Engine, Finish, Outcome, Pair
from attnpress.tasks import TaskError

TRIES = 3
"""Workers that may die on one file in a run. Some files kill every worker, and Ray would restart them forever."""

LOCAL = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}


class Worker:
    """A process of the cluster; it predicts one file at a time.

    Args:
        deployment: loaded once, with the first file, so that a model that kills its process is reported too.
        place: folder that relative paths refer to.
        run: name of this run of the engine.
        tries: see TRIES.
    """

    def __init__(self, deployment: Deployment, place: str, run: str, tries: int = TRIES) -> None:
        self.deployment, self.place, self.run, self.tries = deployment, place, run, tries
        self.finish: Finish | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """From a row with the paths of a pair to its outcome as text, since Ray Data columns hold no objects."""
        pair, said = Pair(Path(row["source"]), Path(row["output"])), list[str]()
        note = pair.output.with_name(f".{pair.output.name}.tries")
        died = _tries(note, self.run)
        if died < self.tries:
            write_text(note, f"{self.run} {died + 1}")
            with _recorded(said):
                outcome = self._answer(pair, said)
        else:
            outcome = Outcome(
                pair, None, f"{pair.source}: {died} workers died on it or on loading the model; out of memory?"
            )
        note.unlink(missing_ok=True)
        progress = None if outcome.progress is None else dataclasses.asdict(outcome.progress)
        return row | {"outcome": json.dumps({"progress": progress, "reason": outcome.reason, "warnings": said})}

    def _answer(self, pair: Pair, said: list[str]) -> Outcome:
        """The outcome of a file. If the model cannot be loaded, each file reports the reason."""
        try:
            if self.finish is None:
                quiet()
                os.chdir(self.place)
                self.finish = self.deployment.finisher()
        except (PredictionError, ConfigError, ModelError, TaskError, BackendUnavailableError, OSError) as error:
            return Outcome(pair, None, explain(error) if isinstance(error, OSError) else str(error))
        return self.finish(pair, said.append)


def _tries(note: Path, run: str) -> int:
    """The number of workers that started a file in this run and did not finish it."""
    try:
        name, count = note.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return 0
    return int(count) if name == run and count.isdecimal() else 0


@contextmanager
def _recorded(said: list[str]) -> Iterator[None]:
    """Collect warnings inside the `with` block, since a worker's own output is not visible."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield
    said += [str(each.message) for each in found if issubclass(each.category, UserWarning)]


def spread(deployment: Deployment, workers: int | None = None) -> Engine:
    """The engine that distributes files over the workers of a cluster.

    It uses the connected cluster, that of RAY_ADDRESS, or a local one for the duration of the run.

    Args:
        deployment: of each worker. Its folder and the current one must have the same paths on all machines.
        workers: maximum number, with one CPU each, and one GPU for backend "gpu"; None uses the CPUs of the cluster.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray.data
    except ImportError as error:
        raise ConfigError(f"--engine ray needs Ray Data: pip install 'attnpress[ray]' ({error})") from None

    def engine(pairs: Sequence[Pair]) -> Iterator[Outcome]:
        with _connected():
            rows = [{"source": str(pair.source), "output": str(pair.output)} for pair in pairs]
            most = min(len(pairs), workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
            answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                Worker,
                fn_constructor_args=(deployment, str(Path.cwd()), secrets.token_hex(8), TRIES),
                # One file at a time: what waited behind a dead worker would wait for its next life.
                compute=ray.data.ActorPoolStrategy(size=most, max_tasks_in_flight_per_actor=1),
                num_cpus=1,
                num_gpus=1 if deployment.backend == "gpu" else 0,
            )
            told = set[str]()
            try:
                for outcome in map(_outcome, answered.iter_rows()):
                    new = tuple(text for text in outcome.warnings if text not in told)  # workers repeat some messages
                    told.update(new)
                    yield dataclasses.replace(outcome, warnings=new)
            except ray.exceptions.RayError as error:
                raise PredictionError(
                    f"--engine ray: the cluster failed ({_first_line(error)}); outputs that are whole stay: start the "
                    "same command again"
                ) from None

    return engine


@contextmanager
def _connected() -> Iterator[None]:
    """Connect Python to a cluster inside the `with` block."""
    import ray.data

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray sends usage statistics
    try:
        ray.init(**LOCAL)
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--engine ray: no cluster to connect to ({_first_line(error)}); see RAY_ADDRESS") from None
    for name, level in {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}.items():
        logging.getLogger(name).setLevel(level)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    try:
        yield
    finally:
        ray.shutdown()


def _outcome(row: dict[str, Any]) -> Outcome:
    plain = json.loads(row["outcome"])
    progress = None if plain["progress"] is None else Progress(**plain["progress"])
    return Outcome(Pair(Path(row["source"]), Path(row["output"])), progress, plain["reason"], tuple(plain["warnings"]))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
