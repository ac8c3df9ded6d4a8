"""How runs are disturbed: kills at random moments, full disks, two processes at once, two machines, one dead."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attnpress.records.run import STAGES, read_record
from tests.torture.subjects import COMPRESS, ENVIRONMENT, RUN, Subject, outcome

Counts = dict[str, int]
Trial = Callable[[Subject, Path, random.Random], Counts]
MOST_KILLS = 60
PATIENCE = 600.0
CABLE = "eth0"


class Skipped(Exception):  # noqa: N818 - no error: this machine does not allow the trial
    """A trial that this machine does not allow; says why."""


def kill_run(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """SIGKILL at random moments of `run`, until it comes to its end."""
    return _kill_until_done(subject, RUN, folder, rng)


def kill_compress(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """SIGKILL at random moments of `compress`, each time a little further, until it comes to its end."""
    return _kill_until_done(subject, COMPRESS, folder, rng)


def _kill_until_done(subject: Subject, name: str, folder: Path, rng: random.Random) -> Counts:
    output, kills = subject.output(name, folder), 0
    loading = 0.7 * subject.seconds[RUN]  # nothing is written while Python imports
    while kills < MOST_KILLS:
        moment = loading + rng.uniform(0, max(1.0, subject.seconds[name] - loading) / 2) * (1 + kills / 8)
        status, errors = _run(subject.command(name, output), kill_after=moment)
        killed = status == -signal.SIGKILL
        kills += killed
        if killed and not _is_whole(name, output):
            continue
        assert killed or status == 0, f"after {kills} kills, {name} ended with {status}: {errors[-1000:]}"
        subject.check(name, output)
        return {f"kills of {name}": kills, f"{name} resumed to the same bytes": int(kills > 0)}
    raise AssertionError(f"{name} never came to its end in {kills} tries")


def _is_whole(name: str, output: Path) -> bool:
    """Whether a process that was stopped had come to its end before: `run` refuses to answer again."""
    return name == RUN and output.exists()


def kill_at_stage(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """SIGKILL inside one stage of `compress`, whichever is drawn, as soon as the stage before is recorded."""
    output, stage = folder / "run", rng.choice(STAGES[1:])
    before = STAGES[STAGES.index(stage) - 1]
    with _started(subject.command(COMPRESS, output)) as running:
        while running.poll() is None and not _has_stage(output, before):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3 * subject.seconds[COMPRESS] / len(STAGES)))
        running.kill()
    killed = running.returncode == -signal.SIGKILL
    status, errors = _run(subject.command(COMPRESS, output))
    assert status == 0, f"resumed in {stage}: {errors[-1000:]}"
    subject.check(COMPRESS, output)
    return {"kills of compress": int(killed), f"killed in or after {before}": int(killed)}


def _has_stage(output: Path, stage: str) -> bool:
    with contextlib.suppress(ValueError, OSError):
        return read_record(output).stage(stage) is not None
    return False


def end_politely(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """Ctrl-C or SIGTERM at a random moment: one line and its status; the same command then goes on."""
    name = rng.choice((RUN, COMPRESS))
    output, number = subject.output(name, folder), rng.choice((signal.SIGINT, signal.SIGTERM))
    with _started(subject.command(name, output)) as running:
        time.sleep(rng.uniform(0.6 * subject.seconds[RUN], 0.9 * subject.seconds[name]))
        running.send_signal(number)
        errors = running.communicate(timeout=PATIENCE)[1]
    told = [line for line in errors.splitlines() if line.startswith("attnpress: ") and "; the same command" in line]
    assert running.returncode in (0, 128 + number), f"{number.name}: status {running.returncode}: {errors[-1000:]}"
    assert "Traceback" not in errors, errors[-1000:]
    assert running.returncode == 0 or len(told) == 1, errors[-1000:]
    left = running.returncode and not _is_whole(name, output)
    status, errors = _run(subject.command(name, output)) if left else (0, "")
    assert status == 0, f"after {number.name}: {errors[-1000:]}"
    subject.check(name, output)
    return {f"{number.name} ended in one line": int(running.returncode != 0)}


def full_disk(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """A disk that fills up in the middle, and has room again: one line, and the same command goes on."""
    name = rng.choice((RUN, COMPRESS))
    with _small_disk(folder / "disk", rng.uniform(0.05, 0.95) * _size(subject, name)) as disk:
        output = subject.output(name, disk)
        status, errors = _run(subject.command(name, output))
        assert status in (0, 1), f"{name} ended with {status}: {errors[-1000:]}"
        if status:
            assert "Traceback" not in errors, errors[-2000:]
            assert errors.strip().splitlines()[-1].startswith("attnpress: "), errors[-1000:]
        shutil.copytree(disk, folder / "room", ignore=shutil.ignore_patterns("lost+found"))
    roomy = subject.output(name, folder / "room")
    again, errors = _run(subject.command(name, roomy)) if status else (0, "")
    assert again == 0, f"with room again: {errors[-1000:]}"
    subject.check(name, roomy)
    return {f"full disks in {name}": int(status != 0)}


def limited_files(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """A limit on the size of files, which fails writes as a quota does: one line; without it, the command goes on."""
    name = rng.choice((RUN, COMPRESS))
    output, largest = subject.output(name, folder), max(_sizes(subject, name))
    limit = int(rng.uniform(0.02, 0.98) * largest)
    status, errors = _run(subject.command(name, output), limit=limit)
    assert status in (0, 1), f"{name} ended with {status}: {errors[-1000:]}"
    assert "Traceback" not in errors, f"limit {limit}: {errors[-2000:]}"
    again, errors = _run(subject.command(name, output)) if status else (0, "")
    assert again == 0, f"without the limit: {errors[-1000:]}"
    subject.check(name, output)
    return {f"quotas in {name}": int(status != 0)}


def two_at_once(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """Two processes with one output: one does the work, the other is refused in one line or finds it done."""
    name = rng.choice((RUN, COMPRESS))
    output = subject.output(name, folder)
    with _started(subject.command(name, output)) as first:
        time.sleep(rng.uniform(0, 0.9 * subject.seconds[name]))
        status, errors = _run(subject.command(name, output))
        first_errors = first.communicate(timeout=PATIENCE)[1]
    both = sorted((status, first.returncode))
    assert both in ([0, 0], [0, 1]), f"ended with {both}: {errors[-500:]} {first_errors[-500:]}"
    refused = errors if status else first_errors
    if both == [0, 1]:
        assert "Traceback" not in refused, refused[-1000:]
        assert refused.strip().splitlines()[-1].startswith("attnpress: "), refused[-1000:]
    subject.check(name, output)
    return {f"two at once in {name}": 1}


def two_machines(subject: Subject, folder: Path, rng: random.Random) -> Counts:
    """torchrun on two machines (network namespaces), one killed; then resumed by one machine alone."""
    output = folder / "run"
    with _namespaces() as names:
        port = rng.randrange(20_000, 30_000)
        machines = [_started(_torchrun(subject, output, rank, port), namespace=name) for rank, name in enumerate(names)]
        with machines[0] as first, machines[1] as second:
            begin = time.monotonic()
            while time.monotonic() - begin < PATIENCE and not _has_stage(output, "dense") and first.poll() is None:
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 5))
            os.killpg(second.pid, signal.SIGKILL)
            first.terminate()  # as a scheduler does when it sees a machine die
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    assert _has_stage(output, "dense"), "the two machines did not come to the first record"
    status, errors = _run(subject.command(COMPRESS, output))
    assert status == 0, f"resumed by one machine: {errors[-1000:]}"
    found = outcome(output)
    assert [stage["name"] for stage in found["record"]["stages"]] == list(STAGES)
    assert not [name for name in found["names"] if "unfinished" in name or "checkpoint-" in name], found["names"]
    return {"machines killed": 1, "resumed with another world size": 1}


TRIALS: dict[str, Trial] = {
    "kill_run": kill_run,
    "kill_compress": kill_compress,
    "limited_files": limited_files,
    "two_at_once": two_at_once,
    "full_disk": full_disk,
    "end_politely": end_politely,
    "kill_at_stage": kill_at_stage,
    "two_machines": two_machines,
}


def _run(command: list[str], *, kill_after: float | None = None, limit: int | None = None) -> tuple[int, str]:
    """Exit status, negative when a signal killed it, and what it told."""
    with _started(command, limit=limit) as running:
        try:
            errors = running.communicate(timeout=kill_after or PATIENCE)[1]
        except subprocess.TimeoutExpired:
            running.kill()
            errors = running.communicate()[1]
            assert kill_after is not None, f"did not end in {PATIENCE:g} s: {errors[-1000:]}"
    return running.returncode, errors


def _started(command: list[str], *, limit: int | None = None, namespace: str | None = None) -> subprocess.Popen[str]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = ["ip", "netns", "exec", namespace, *command] if namespace else command
    return subprocess.Popen(
        words, env=ENVIRONMENT | ({"GLOO_SOCKET_IFNAME": CABLE} if namespace else {}), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, errors="replace",
        preexec_fn=limited, start_new_session=namespace is not None,
    )  # fmt: skip


def _sizes(subject: Subject, name: str) -> list[int]:
    if name == RUN:
        return [subject.answers.stat().st_size]
    return [path.stat().st_size for path in subject.whole.rglob("*") if path.is_file()]


def _size(subject: Subject, name: str) -> float:
    """What a command needs on disk at its height, about: of a run, two checkpoints with optimizer state as well."""
    return sum(_sizes(subject, name)) * (4 if name == COMPRESS else 1)


@contextmanager
def _small_disk(place: Path, size: float) -> Iterator[Path]:
    place.mkdir()
    if os.geteuid() != 0:
        raise Skipped("only root may mount a small disk")
    options = f"size={max(4096, int(size))}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        raise Skipped(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def _namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a cable: 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise Skipped("network namespaces need root and iproute2")
    names = (f"attnpress-{os.getpid()}-0", f"attnpress-{os.getpid()}-1")
    ends = (f"ap{os.getpid() % 100000}a", f"ap{os.getpid() % 100000}b")
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]]
    for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
        steps += [["link", "set", end, "netns", name, "name", CABLE]]
        steps += [["-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", CABLE]]
        steps += [["-n", name, "link", "set", CABLE, "up"], ["-n", name, "link", "set", "lo", "up"]]
    try:
        for step in steps:
            done = subprocess.run(["ip", *step], capture_output=True, text=True)
            if done.returncode != 0:
                raise Skipped(f"no network namespaces here: ip {' '.join(step)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _torchrun(subject: Subject, output: Path, rank: int, port: int) -> list[str]:
    module = ["--module", "attnpress.cli", *subject.command(COMPRESS, output)[3:]]
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
    return [
        sys.executable, "-m", "torch.distributed.run", *where, "--master-addr", "10.77.0.1", "--master-port", str(port),
        *module,
    ]  # fmt: skip
