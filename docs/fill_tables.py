"""Write the tables of README.md from the committed records: `python docs/fill_tables.py`. A test holds them equal."""

from __future__ import annotations

import re
from pathlib import Path

from attnpress.report.render import seeds_markdown, stages_markdown
from attnpress.results import read_record

ROOT = Path(__file__).parents[1]
RECIPES = {"8 bits": "mrpc-8bit"}


def tables() -> dict[str, str]:
    """Markdown by the name in the markers."""
    groups = {
        label: [read_record(path) for path in sorted((ROOT / "records").glob(f"{stem}-seed*.json"))]
        for label, stem in RECIPES.items()
    }
    return {"demo": stages_markdown(read_record(ROOT / "records" / "demo.json")), "mrpc": seeds_markdown(groups)}


def filled(text: str) -> str:
    """The text with everything between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    known = tables()
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{known[found[2]]}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
