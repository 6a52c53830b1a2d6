"""A site's log file: every line says what it is about, many processes write to it, and it never grows beyond its limit."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any, Literal

import pytest

from fedflow.engine.logs import LogFile
from fedflow.errors import RecipeError
from fedflow.recipe import SiteConfig

ABOUT = {"site": "site-1", "run": "r", "round": 3, "phase": None}


def logger(path: Path, form: Literal["text", "json"] = "text", size: int = 10_000, keep: int = 2) -> logging.Logger:
    log = logging.Logger("of a test", logging.INFO)
    log.addHandler(LogFile(path, form, size, keep, ABOUT))
    return log


def write(path: Path, who: int, size: int, keep: int) -> None:
    """For a process of its own."""
    log = logger(path, "json", size, keep)
    for number in range(200):
        log.info("%d %d", who, number)


def test_every_line_has_run_round_and_site(tmp_path: Path) -> None:
    log = logger(tmp_path / "log")
    log.warning("two\nlines")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(" WARNING ")[2] for line in lines] == [
        "site=site-1 run=r round=3 | two",
        "site=site-1 run=r round=3 | lines",
    ]


def test_as_json_a_line_is_an_object_with_its_traceback(tmp_path: Path) -> None:
    log = logger(tmp_path / "log", "json")
    try:
        raise ValueError("ä")
    except ValueError:
        log.exception("it failed")
    (line,) = (tmp_path / "log").read_text().splitlines()
    found: dict[str, Any] = json.loads(line)
    assert (found["site"], found["run"], found["round"], found["level"]) == ("site-1", "r", 3, "ERROR")
    assert found["message"].startswith("it failed\nTraceback") and found["message"].endswith("ValueError: ä")
    assert "phase" not in found


def test_many_processes_lose_no_line_and_no_file_grows_beyond_its_limit(tmp_path: Path) -> None:
    path, size, keep = tmp_path / "log", 4096, 100
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=write, args=(path, who, size, keep)) for who in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    files = list(tmp_path.iterdir())
    lines = [json.loads(line)["message"] for file in files for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{who} {number}" for who in range(3) for number in range(200))
    # over by the line that fills it, and those of who waited meanwhile
    assert max(file.stat().st_size for file in files) < size + 1000


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    log = logger(tmp_path / "log", size=4096, keep=2)
    for number in range(1000):
        log.info("line %d", number)
    assert {path.name for path in tmp_path.iterdir()} <= {"log", "log.1", "log.2"}
    assert "line 0\n" not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_a_log_in_no_folder_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    fields = {"name": "a", "store": "memory://x", "state": str(tmp_path), "log": {"path": str(tmp_path / "no" / "log")}}
    with pytest.raises(RecipeError, match=r"log\.path.*expected an absolute path in a folder that is there"):
        SiteConfig.load(fields)
