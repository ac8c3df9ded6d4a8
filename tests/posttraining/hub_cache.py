"""A cache of the Hub as huggingface_hub lays it out, filled from folders instead of downloads."""

from __future__ import annotations

import hashlib
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add_to_cache(cache: Path, name: str, folder: Path) -> Path:
    """Put a model folder into the cache, as if `name` had been downloaded; returns the snapshot's folder."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = place / "snapshots" / COMMIT, place / "blobs"
    for each in (snapshot, blobs, place / "refs"):
        each.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content, link = file.read_bytes(), snapshot / file.relative_to(folder)
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot
