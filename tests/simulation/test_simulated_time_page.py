"""The examples of docs/simulated-time.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedflow.simulation.engine import simulate
from fedflow.simulation.tables import Row
from fedflow.simulation.trace_files import read_trace
from tests.builders import SITES, recipe

PAGE = (Path(__file__).parents[2] / "docs/simulated-time.md").read_text()
STEPS = {"steps": 2, "batch_size": 4, "optimizer": {"lr": 0.1}}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("kind", ["csv", "yaml"])
def test_a_trace_in_the_page_drives_a_run(kind: str, tmp_path: Path) -> None:
    (text,) = blocks(kind)
    path = tmp_path / f"trace.{kind}"
    path.write_text(text)
    journal = simulate(recipe(training=STEPS, quorum=2), SITES, trace=read_trace(path), backend="debug")
    assert len(journal.committed()) == 2


def test_the_code_in_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generated, schedule = blocks("python")
    scope: dict[str, Any] = {"recipe": recipe(training=STEPS, wait_for_sites="1d"), "sites": SITES}
    exec(generated.replace("trace=trace", 'trace=trace, backend="debug"'), scope)
    assert len(scope["journal"].committed()) == 2
    (tmp_path / "every_k.py").write_text(schedule)
    monkeypatch.syspath_prepend(str(tmp_path))
    buffered = recipe(training=STEPS, wait_for_sites="1d", schedule={"kind": "every_k:EveryK", "k": 2})
    assert len(simulate(buffered, SITES, trace=scope["trace"], backend="debug").committed()) == 2


def test_the_page_names_every_column() -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("|"))
    assert [name for name in Row.model_fields if f"`{name}`" not in table] == []
