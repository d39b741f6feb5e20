"""Agent x engine x benchmark: scores with intervals, resumable and within spending caps."""
