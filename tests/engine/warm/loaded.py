"""Remembers which process imported it, and what a child of that process can be asked for."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from typing import Any

from fedflow.engine.forks import Line

IMPORTED_BY = os.getpid()


def who(argument: Any, line: Line) -> None:
    """Say who imported this module, who runs, and what was given."""
    line.send({"imported by": IMPORTED_BY, "runs": os.getpid(), "group": os.getpgid(0), "given": argument})


def imports(module: str, line: Line) -> None:
    """Say whether `module` was there, and import it."""
    line.send({"there": module in sys.modules})
    importlib.import_module(module)


def leave(code: int, line: Line) -> None:
    sys.exit(code)


def last_words(words: int, line: Line) -> None:
    """Begin a message that never ends, and end by SIGKILL."""
    line.socket.sendall(b'{"unfinished": "' + b"x" * words)
    os.kill(os.getpid(), 9)


def start_another(argument: Any, line: Line) -> None:
    """Start a process, say which, and never come back."""
    line.send({"started": subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid})
    threading.Event().wait()


def found(modules: list[str], line: Line) -> None:
    """Say which of `modules` were there when this child began, and whether CUDA was touched; then wait to be looked at."""
    torch = sys.modules["torch"]
    line.send({"there": [m for m in modules if m in sys.modules], "cuda": torch.cuda.is_initialized()})
    threading.Event().wait()
