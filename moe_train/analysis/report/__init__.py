"""moe-report: leaderboard, comparison with a baseline, and a page for each run."""
