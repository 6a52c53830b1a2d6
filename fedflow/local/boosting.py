"""A process for one call of xgboost's federated plug-in, started by path: `boosting.py serve|train`, its job as JSON in a file.

It ends when its standard input does: so with the site's process, however that ends; the job's folder, with the site's rows in it, goes with it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any


def serve(job: dict[str, Any]) -> None:
    """xgboost's federated server, until all have gone."""
    from xgboost.federated import run_federated_server

    tls = _named(job, "server_key_path", "server_cert_path", "client_cert_path")
    run_federated_server(job["size"], job["port"], timeout=int(job["patience"]), **tls)


def train(job: dict[str, Any]) -> None:
    """The new trees into the file `out`."""
    import xgboost

    where = {"dmlc_communicator": "federated", "federated_server_address": job["server"]}
    place = {"federated_world_size": job["size"], "federated_rank": job["rank"]}
    tls = _named(job, "federated_client_key_path", "federated_client_cert_path", "federated_server_cert_path")
    with xgboost.collective.CommunicatorContext(**where, **place, **tls):
        booster = xgboost.Booster(model_file=job["booster"]) if job["booster"] else None
        start = booster.num_boosted_rounds() if booster else 0
        rows = xgboost.DMatrix(job["rows"])
        grown = xgboost.train(job["params"], rows, job["iterations"], xgb_model=booster)
    half = Path(job["out"] + ".half")
    half.write_bytes(grown[start : start + job["iterations"]].save_raw("json"))
    half.rename(job["out"])


def _named(job: dict[str, Any], *names: str) -> dict[str, str]:
    """The site's key and certificate, and that of who signed the others', as xgboost calls them here; nothing where there are none."""
    if not (tls := job.get("tls")):
        return {}
    return dict(zip(names, (tls["private_key"], tls["certificate"], tls["authority"]), strict=True))


def _end_with_the_parent() -> None:
    sys.stdin.buffer.read()
    shutil.rmtree(Path(sys.argv[2]).parent, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    task, given = sys.argv[1:]
    try:
        {"serve": serve, "train": train}[task](json.loads(Path(given).read_text(encoding="utf-8")))
    except Exception as error:
        Path(given + ".error").write_text(
            f"{type(error).__name__}: {str(error).partition('Stack trace')[0]}", encoding="utf-8"
        )
        os._exit(1)
    os._exit(0)
