"""Studies: many runs that answer one question (evidence, leaderboard, sweep) and share one dense model."""
