"""leaderboard: the pruning rules of the field with the same model, tasks, seeds, bits and training."""

from attnpress.studies.leaderboard.run import run_board
from attnpress.studies.leaderboard.spec import BoardSpec, EntrySpec

__all__ = ["BoardSpec", "EntrySpec", "run_board"]
