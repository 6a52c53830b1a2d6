"""The command line: `fedflow`. Importing it imports neither torch nor Prefect, so that `fedflow --help` answers at once."""

from fedflow.cli.app import main

__all__ = ["main"]
