"""sweep: search for recipes of the best metric at the least work, by several workers and over several days."""

from attnpress.studies.sweep.spec import SearchSpec, SweepSpec
from attnpress.studies.sweep.worker import sweep

__all__ = ["SearchSpec", "SweepSpec", "sweep"]
