"""One rank of a pipeline: receive, run, send. Knows no FX, no pieces, no graphs. Start reading in ``runner.py``."""
