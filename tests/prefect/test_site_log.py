"""What a site says while it trains is in its flow run's log. No server is needed to see that."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine.rounds import next_step, open_round, start_run
from fedflow.flows import site as flow
from fedflow.local import ScriptWorkload
from fedflow.recipe import SiteConfig
from fedflow.store.objects import ObjectStore
from tests.builders import SITES, recipe


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def workload() -> ScriptWorkload:
    return ScriptWorkload([sys.executable, "-c", "import sys; print('to stdout'); sys.exit('to stderr')"])


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """What reaches the flow run's log, which is Prefect's and no parent or child of fedflow's."""
    log, heard = logging.Logger("prefect.flow_runs", logging.INFO), Heard()
    log.addHandler(heard)
    monkeypatch.setattr(flow, "get_run_logger", lambda: log)
    return heard


def test_what_a_script_prints_is_in_the_runs_log(heard: Heard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = recipe(workload=f"{__name__}:workload")
    journal = start_run(ObjectStore(str(tmp_path / "store")), "run", given, SITES)
    step = next_step(journal, given)
    assert step is not None
    open_round(journal, step)
    config = SiteConfig(name=SITES[0], store=journal.store.url, state=str(tmp_path / "state"), allowed_imports=["*"])
    monkeypatch.setattr(SiteConfig, "here", lambda: config)
    before = logging.getLogger("fedflow").level, list(logging.getLogger("fedflow").handlers)
    training: Any = flow.local_training.fn
    with pytest.raises(Exception, match="the script ended with exit code 1"):
        training("run", 0, step.phase, 1, 1, SITES[0])
    assert {("INFO", "to stdout"), ("INFO", "to stderr")} <= set(heard.lines)
    assert (logging.getLogger("fedflow").level, logging.getLogger("fedflow").handlers) == before
