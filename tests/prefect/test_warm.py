"""What the workers' own children find imported, and what they are forked from."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import yaml

from fedflow.engine.forks import ForkServer
from fedflow.prefect.worker import CoordinatorWorker, SiteWorker
from fedflow.recipe import SiteConfig

SECONDS = 100.0
FOUND = "tests.engine.warm.loaded:found"


@pytest.mark.parametrize(
    ("preload", "modules"),
    [
        (
            SiteWorker.preload,
            ["torch", "prefect", "fedflow.flows.site", "fedflow.flows.aggregation", "pandas", "pyarrow"],
        ),
        (CoordinatorWorker.preload, ["torch", "prefect", "fedflow.flows.training", "fedflow.flows.round"]),
    ],
    ids=["site", "coordinator"],
)
def test_a_flow_run_is_forked_from_one_thread_that_has_imported_all(
    preload: str, modules: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the site's configuration preloads, but for what would start a thread; CUDA is not touched, and no connection open."""
    threaded = "tests.engine.warm.threaded"
    config = {"name": "a", "store": str(tmp_path), "state": str(tmp_path), "preload": ["pandas", threaded]}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv(SiteConfig.environment_variable, str(tmp_path / "site.yaml"))
    server = ForkServer([preload])
    child = server.fork(FOUND, [*modules, threaded])
    try:
        assert child.receive(SECONDS) == {"there": modules, "cuda": False}
        parent = psutil.Process(child.pid).parent()
        assert parent.cmdline() == psutil.Process(child.pid).cmdline()  # forked, not spawned
        assert parent.num_threads() == 1 and parent.net_connections() == []
    finally:
        child.end()
        server.close()
