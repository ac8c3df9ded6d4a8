"""leaderboard: published pruning rules with the same model, tasks, seeds, bits and training."""

from attnpress.studies.leaderboard.run import run_board
from attnpress.studies.leaderboard.spec import BoardSpec, EntrySpec

__all__ = ["BoardSpec", "EntrySpec", "run_board"]
