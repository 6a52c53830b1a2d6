"""A module that leaves a thread behind when it is imported."""

from __future__ import annotations

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()

from tests.engine.warm.loaded import who  # noqa: E402, F401
