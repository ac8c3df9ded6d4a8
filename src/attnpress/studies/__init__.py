"""Many runs that answer one question: evidence, leaderboard, sweep; all share one dense model."""
