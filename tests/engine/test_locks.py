"""Locks of this machine: who may make them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from fedflow.engine.locks import held, holder
from fedflow.errors import UserError


def test_a_lock_is_held_until_its_holder_lets_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert holder("a") is None
    with held("a"):
        assert holder("a") == os.getpid() and holder("b") is None
    assert holder("a") is None


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
