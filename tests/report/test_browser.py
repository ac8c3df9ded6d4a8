"""The page in a real browser: nothing overflows or is cut off at three widths, each figure is named and described.

One headless run draws the page in three frames and writes what it measured into the document; skipped without browser.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from attnpress.records.reading import to_json
from attnpress.records.sweep import SweepRecord, TrialRecord, pareto_front
from attnpress.report.page import make_report

WIDTHS = (360, 768, 1280)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip

MEASURE = """
const name = node => node.tagName + "." + (node.id || node.textContent.slice(0, 40).trim());
const measured = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  const boxes = [...page.querySelectorAll("body *")].filter(node => !node.closest("svg, thead"));
  const wide = boxes.filter(node => node.getBoundingClientRect().right > width + 0.5 || node.scrollWidth > node.clientWidth + 1 && node.clientWidth);
  const cut = [...page.querySelectorAll("svg text")].filter(text => {
    const [inner, outer] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
  });
  const text = [...page.querySelectorAll("svg text")].map(text => {
    const svg = text.closest("svg"), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return parseFloat(getComputedStyle(text).fontSize) * scale;
  });
  const words = id => page.getElementById(id)?.textContent.trim() || "";
  const figures = [...page.querySelectorAll("figure")].map(figure => {
    const svg = figure.querySelector("svg[role=img]");
    return [words(svg?.getAttribute("aria-labelledby")), words(svg?.getAttribute("aria-describedby")), svg?.getBoundingClientRect().height];
  });
  const fetched = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  return {width, scroll: page.documentElement.scrollWidth, wide: wide.map(name), cut: cut.map(name), smallest: Math.min(...text), figures, fetched};
});
document.body.insertAdjacentHTML("beforeend", "<pre id=measured></pre>");
document.getElementById("measured").textContent = JSON.stringify(measured);
"""  # noqa: E501


def swept(folder: Path) -> Path:
    """A sweep of three trials, as its folder holds it."""
    words = "4-8/4-8/4-8/4 bits, threshold, sparsity 0.6011 to 0.9788"
    shared: dict[str, Any] = {"watched": {}, "recipe": {}, "folder": "", "sparsity": 0.9, "params": {}}
    trials = [
        TrialRecord(
            number=number, state="complete", chosen=words, metric=80.0 + number, work=0.01 + 0.01 * number, **shared
        )
        for number in range(3)
    ]
    record = SweepRecord("movie", "accuracy", 82.9, 50.0, {"seed": 0}, {"trials": 3}, trials, pareto_front(trials))
    folder.mkdir()
    (folder / "sweep.json").write_text(to_json(record), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if BROWSER is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    folder = tmp_path_factory.mktemp("browser")
    record = Path(__file__).parents[2] / "records" / "demo.json"
    page = html.escape(make_report([finished, record, swept(folder / "sweep")]).html)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in WIDTHS)
    script = f'<script>addEventListener("load", () => {{{MEASURE}}})</script>'
    text = f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}{script}'
    (folder / "frames.html").write_text(text, encoding="utf-8")
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        (folder / "frames.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="measured">(.*)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    frames_found: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return frames_found


def test_nothing_overflows_at_three_widths(measured: list[dict[str, Any]]) -> None:
    assert len(measured) == len(WIDTHS)
    for frame, width in zip(measured, WIDTHS, strict=True):
        assert width - 20 <= frame["width"] <= width, "but for a scroll bar"
        assert frame["scroll"] <= frame["width"]
        assert frame["wide"] == []


def test_no_letters_are_cut_off_or_too_small(measured: list[dict[str, Any]]) -> None:
    for frame in measured:
        assert frame["cut"] == []
        assert frame["smallest"] > 8, "pixels"


def test_each_figure_has_a_name_and_a_description(measured: list[dict[str, Any]]) -> None:
    for frame in measured:
        assert len(frame["figures"]) > 30
        for title, words, height in frame["figures"]:
            assert len(title) > 3
            assert len(words) > 30, title
            assert height > 100, title


def test_nothing_is_fetched(measured: list[dict[str, Any]]) -> None:
    assert [frame["fetched"] for frame in measured] == [[], [], []]
