"""The report page: sections of tables, figures and notes in a template, without external resources."""

from __future__ import annotations

import importlib.util
import itertools
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from attnpress.records.sweep import FILE, SweepRecord, read_sweep
from attnpress.report.attention_figures import histogram_drawings, map_drawings
from attnpress.report.figures import (
    Drawing,
    head_drawings,
    mean_and_spread,
    metric_drawings,
    speed_drawings,
    training_drawings,
    work_drawings,
)
from attnpress.report.front import front_drawing, front_summary
from attnpress.report.inputs import AFTER, Group, Run, group_runs, read_runs, read_timings
from attnpress.report.lanes import lane_drawings
from attnpress.report.render import SEEDS_COLUMNS, caption, front_caption, front_rows, seeds_rows, stage_rows

ON_PAGE = {"ink": "var(--ink)", "line": "var(--line)", "paper": "var(--paper)"}
NEEDED = ("jinja2", "matplotlib")
OLD = (
    "The record lacks {what}: it was made before they were kept, stands apart from its run folder, or is a brief one "
    "of a table."
)

STAGES_LEAD = (
    "Each stage of the run, evaluated on the same rows. A score has to be computed before its pair can be "
    "pruned, so at least half of the multiply-accumulates stay."
)


FRONT_LEAD = (
    "Trials of a sweep that no other beats in both score and work; each is written as a recipe in the sweep's folder "
    "front/. Work is that of the two products of attention, each multiplication weighed by the bits of its operands."
)


class ReportError(ValueError):
    """A report cannot be made. The message says what is missing."""


@dataclass(frozen=True)
class Table:
    """Text cells under a header; a note explains the columns."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Section:
    """A section of the page.

    Attributes:
        name: anchor.
        heading: shown.
        lead: a sentence or two.
        tables, drawings: contents.
        notes: what is missing, and why.
    """

    name: str
    heading: str
    lead: str = ""
    tables: list[Table] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[list[Drawing]]:
        """Drawings shown side by side: all except maps of attention, which are much taller."""
        return [list(same) for _, same in itertools.groupby(self.drawings, lambda one: one.name.startswith("map-"))]


@dataclass(frozen=True)
class Report:
    """The page, and its figures as SVG text by file name."""

    html: str
    figures: dict[str, str]


def make_report(paths: Sequence[Path], bench: Sequence[Path] = ()) -> Report:
    """Make a report of finished or unfinished runs, from their records alone.

    Args:
        paths: run folders, records or tables of records, and folders of sweeps. Runs of one recipe are drawn together.
        bench: timings written by `attnpress bench --json`, besides those in the run folders.

    Raises:
        RecordError: a record or timing cannot be read.
        ReportError: the extra `report` is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ReportError(f"report needs {', '.join(missing)}: pip install 'attnpress[report]'")
    swept = [path for path in paths if (path / FILE).is_file()]
    runs = [path for path in paths if path not in swept]
    sweeps, groups = [read_sweep(path) for path in swept], group_runs([run for path in runs for run in read_runs(path)])
    timings = read_timings([*[path for path in runs if path.is_dir()], *bench])
    sections = [_front(number, sweep) for number, sweep in enumerate(sweeps, start=1)]
    if groups:
        sections += _sections(groups, timings)
    sections.append(_provenance(groups, sweeps))
    drawn = _draw(sections)
    return Report(_fill(groups, sweeps, sections, drawn), _files(drawn))


def _front(number: int, sweep: SweepRecord) -> Section:
    section = Section(f"front-{number}", f"Front: {sweep.task}", FRONT_LEAD)
    if sweep.front:
        header, *rows = front_rows(sweep)
        section.tables.append(Table(header, rows, front_caption(sweep)))
        section.drawings.append(front_drawing(number, sweep))
    else:
        section.notes.append(f"No trial has come to its end yet. {front_caption(sweep)}")
    return section


def _sections(groups: Sequence[Group], timings: Sequence[dict[str, Any]]) -> Iterator[Section]:
    yield Section(
        "stages",
        "Stages",
        STAGES_LEAD,
        tables=[table for group in groups for table in _stage_tables(group, groups)],
        drawings=[*metric_drawings(groups), *work_drawings(groups)],
    )
    for number, group in enumerate(groups, start=1):
        yield from _group_sections(number, group, f": {group.label}" if len(groups) > 1 else "")
    speed = Section("speed", "Speed", drawings=list(speed_drawings(timings)))
    speed.lead = "One attention call of the compiled kernel, on the machine where attnpress bench was run."
    if not timings:
        speed.lead = ""
        speed.notes.append(
            "No timings are here: attnpress bench --json FILE makes them; put the file into the run folder."
        )
    yield speed


def _group_sections(number: int, group: Group, suffix: str) -> Iterator[Section]:
    run = group.runs[0]
    seed = f" of run {run.name}, the first of {len(group.runs)}" if len(group.runs) > 1 else ""
    training = Section(f"training-{number}", f"Training{suffix}", drawings=list(training_drawings(number, group)))
    training.lead = (
        "By step, as logged. The loss of the compressed stage holds the distance to its teacher, so the two do not "
        "compare; the metric is watched on a few evaluation rows only."
    )
    heads = Section(f"heads-{number}", f"Layers and heads{suffix}", drawings=list(head_drawings(number, run)))
    heads.lead = (
        f"The compressed model, head by head{seed}. Errors are relative root-mean-square errors on a few rows. The "
        "output error compares a head's output with exact attention on the same Q, K and V: 0 is exact, 1 is as wrong "
        "as an output of zeros."
    )
    inside = Section(f"attention-{number}", f"Attention{suffix}")
    inside.lead = (
        f"Three heads{seed}: those whose output compression changes least, in the middle, and most. "
        "In maps, grey is a P of zero: in the compressed model, a pair that is skipped."
    )
    inside.drawings = [*histogram_drawings(number, run), *map_drawings(number, run)]
    balance = Section(f"lanes-{number}", f"Load balance{suffix}", drawings=list(lane_drawings(number, run.lanes)))
    balance.lead = (
        f"Cycles of P V on parallel lanes{seed}, a survivor a lane and cycle, over what they would be if every lane "
        "were always busy."
    )
    if not balance.drawings:
        balance.lead = ""
        balance.notes.append("No load balance is here: attnpress export RUN_DIR --to csv counts it.")
    for section, what in ((training, "training logs"), (heads, "figures of heads"), (inside, "samples of attention")):
        if not section.drawings:
            section.lead = ""
            section.notes.append(OLD.format(what=what))
    names = " ".join(drawing.name for drawing in (*training.drawings, *heads.drawings))
    if training.drawings and "training-metric" not in names:
        training.notes.append(OLD.format(what="the metric while training"))
    if heads.drawings and "heads-error" not in names:
        heads.notes.append(OLD.format(what="quantization errors"))
    yield from (training, heads, inside, balance)


def _stage_tables(group: Group, groups: Sequence[Group]) -> Iterator[Table]:
    record = group.records[0]
    if len(group.runs) == 1 or any(one.stage("dense") is None for one in group.records):
        for run in group.runs:
            header, *rows = stage_rows(run.record)
            yield Table(header, rows, f"{group.label}, run {run.name}: {caption(run.record)}")
        return
    every = [one for other in groups for one in other.records if one.stage("dense")]
    header = tuple(column.format(metric=record.headline) for column in SEEDS_COLUMNS)
    note = (
        f"{group.label}: mean and standard deviation over seeds; against the dense model trained equally long, if any."
    )
    yield Table(header, seeds_rows(group.records, every), f"{note} {caption(record)}")


def _task(group: Group) -> str:
    return str(group.records[0].recipe["data"]["task"])


def summary(group: Group) -> str:
    """The result in one sentence."""
    done = [(record, stage) for record in group.records if (stage := record.stage(AFTER))]
    if not done:
        return f"{group.label}: not compressed to the end yet."
    headline = done[0][0].headline
    dense = [stage.metrics[headline] for record in group.records if (stage := record.stage("dense"))]
    sparsity, keys = (
        statistics.fmean(getattr(stage, name) for _, stage in done) for name in ("sparsity", "keys_per_row")
    )
    scores = mean_and_spread([stage.metrics[headline] for _, stage in done])
    return (
        f"{group.label}: {headline} {scores} against {mean_and_spread(dense) if dense else 'an unknown score'} dense, "
        f"with {sparsity:.1%} of the valid pairs skipped and {keys:.2f} keys per query."
    )


def _provenance(groups: Sequence[Group], sweeps: Sequence[SweepRecord]) -> Section:
    section = Section("provenance", "Provenance", "What the figures rest on, and the recipe behind each.")
    for run in (run for group in groups for run in group.runs):
        rows = [*flat(run.record.provenance)]
        section.tables.append(Table(("key", "value"), rows, f"Run {run.name}"))
    for sweep in sweeps:
        rows = [*flat(sweep.provenance), *flat({"sweep": sweep.sweep})]
        section.tables.append(Table(("key", "value"), rows, f"Sweep of {sweep.task}, and its dense teacher"))
    return section


def flat(data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as dotted keys and values."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "none" if data is None else str(data)


def _recipes(runs: Iterable[Run]) -> dict[str, str]:
    return {run.name: str(yaml.safe_dump(run.record.recipe, sort_keys=False)) for run in runs}


def _draw(sections: Iterable[Section]) -> dict[str, str]:
    """Every figure as SVG in marker colours, by the name of its drawing."""
    from attnpress.report.plots import to_svg

    drawings = (drawing for section in sections for drawing in section.drawings)
    return {drawing.name: _described(to_svg(drawing.figure, drawing.name), drawing) for drawing in drawings}


def _inline(svg: str) -> Any:
    from markupsafe import Markup

    from attnpress.report.plots import recolored

    # Without a fixed size, the drawing fills the width of the page.
    sizeless = re.sub(r"(?<=<svg)[^>]*>", lambda tag: re.sub(r' (width|height)="[^"]*"', "", tag[0]), svg, count=1)
    return Markup(recolored(sizeless, ON_PAGE))


def _described(svg: str, drawing: Drawing) -> str:
    """The drawing with its title and description, for screen readers."""
    from markupsafe import escape

    ids = f"{drawing.name}-title", f"{drawing.name}-words"
    words = (
        f'<title id="{ids[0]}">{escape(drawing.title)}</title><desc id="{ids[1]}">{escape(drawing.description)}</desc>'
    )
    opened = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{ids[0]}" aria-describedby="{ids[1]}" ', 1)
    return re.sub(r"(<svg[^>]*>)", lambda found: found[1] + words, opened, count=1)


def _files(drawn: Mapping[str, str]) -> dict[str, str]:
    from attnpress.report.plots import PRINT, recolored

    return {f"{name}.svg": recolored(svg, PRINT) for name, svg in drawn.items()}


def _fill(
    groups: Sequence[Group], sweeps: Sequence[SweepRecord], sections: Sequence[Section], drawn: Mapping[str, str]
) -> str:
    import jinja2

    template = files("attnpress.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    made = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return made.from_string(template).render(
        title=", ".join(dict.fromkeys([*(sweep.task for sweep in sweeps), *map(_task, groups)])),
        summaries=[*map(front_summary, sweeps), *map(summary, groups)],
        sections=sections,
        drawn={name: _inline(svg) for name, svg in drawn.items()},
        recipes=_recipes(run for group in groups for run in group.runs),
    )
