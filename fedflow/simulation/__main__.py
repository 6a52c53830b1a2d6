"""`python -m fedflow.simulation SPEC`: the background process of a SimEnv. SPEC: JSON with run, store, book, backend, workers."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from fedflow.engine.rounds import recording_outcome
from fedflow.errors import FedflowError, RoundAborted
from fedflow.memory import settle
from fedflow.simulation.engine import simulate
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore


def main(spec: dict[str, object]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    run, url = str(spec["run"]), str(spec["store"])
    journal = Journal(ObjectStore(url, spec.get("store_options")), run)  # type: ignore[arg-type]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settle()
    try:
        with recording_outcome(journal), _stoppable():
            simulate(
                journal.recipe(),
                journal.sites(),
                store=url,
                store_options=spec.get("store_options"),  # type: ignore[arg-type]
                run=run,
                book=Path(str(spec["book"])),
                backend=spec["backend"],  # type: ignore[arg-type]
                workers=spec["workers"],  # type: ignore[arg-type]
            )
    except FedflowError as error:
        logging.getLogger("fedflow").error("%s", error)
        return 1
    return 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise RoundAborted("stopped") from None


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
