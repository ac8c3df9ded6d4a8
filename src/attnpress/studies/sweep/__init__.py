"""sweep: search for recipes with the best metric at the least work, by several workers, resumable."""

from attnpress.studies.sweep.spec import SearchSpec, SweepSpec
from attnpress.studies.sweep.worker import sweep

__all__ = ["SearchSpec", "SweepSpec", "sweep"]
