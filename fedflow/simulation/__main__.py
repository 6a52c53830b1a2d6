"""`python -m fedflow.simulation RUN`: the background process of a SimEnv. On stdin: JSON with run, store, store_options, book,
backend, workers, journal_every."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedflow.engine.rounds import recording_outcome
from fedflow.errors import FedflowError, RoundAborted
from fedflow.memory import settle
from fedflow.simulation.engine import simulate
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore


def main(spec: dict[str, Any]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    run, store, options = spec["run"], spec["store"], spec["store_options"]
    journal = Journal(ObjectStore(store, options), run)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settle()
    try:
        with recording_outcome(journal), _stoppable():
            simulate(
                journal.recipe(),
                journal.sites(),
                store=store,
                store_options=options,
                run=run,
                book=Path(spec["book"]),
                backend=spec["backend"],
                workers=spec["workers"],
                journal_every=spec["journal_every"],
            )
    except FedflowError as error:
        logging.getLogger("fedflow").error("%s", error, exc_info=error.__cause__)
        return 1
    return 0


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise RoundAborted("stopped") from None


if __name__ == "__main__":
    sys.exit(main(json.load(sys.stdin)))
