"""What a run survives, tried on real servers: `python -m benchmarks.chaos`."""
