"""Locks of this machine: who may make them."""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from pathlib import Path

import pytest

from fedflow.engine.locks import held, holder, remove
from fedflow.errors import UserError


def test_a_lock_is_held_until_its_holder_lets_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert holder("a") is None
    with held("a"):
        assert holder("a") == os.getpid() and holder("b") is None
    assert holder("a") is None
    assert not [*(tmp_path / f"fedflow-locks-{os.getuid()}").iterdir()]


def test_a_lock_that_is_removed_while_somebody_waits_for_it_has_one_holder_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who waited has the removed file, who comes then a new one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    entered, leaves = threading.Event(), threading.Event()

    def wait() -> None:
        with held("a"):
            entered.set()
            leaves.wait()

    waiting = threading.Thread(target=wait)
    with held("a"):
        waiting.start()
        while not WAITING.search(Path("/proc/locks").read_text()):
            time.sleep(0.01)
        remove("a")
        newcomer = held("a")
        newcomer.__enter__()
    try:
        assert not entered.wait(0.5)
    finally:
        newcomer.__exit__(None, None, None)
        leaves.set()
        waiting.join()
    assert entered.is_set() and holder("a") is None


WAITING = re.compile(rf"-> FLOCK +ADVISORY +WRITE {os.getpid()} ")
"""A line of /proc/locks."""


@pytest.mark.parametrize("how", ["open to all", "a link"])
def test_a_folder_that_somebody_else_may_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """Temporary files are everybody's: who was there first could say which process is to be killed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, there = tmp_path / f"fedflow-locks-{os.getuid()}", tmp_path / "there"
    there.mkdir()
    if how == "a link":
        folder.symlink_to(there)
    else:
        there.rename(folder)
        folder.chmod(0o777)
    with pytest.raises(UserError, match=rf"locks: found '{folder}', expected a folder that this user alone"), held("a"):
        pass
    with pytest.raises(UserError, match="remove it"):
        holder("a")
