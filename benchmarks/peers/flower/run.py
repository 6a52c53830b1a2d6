"""Flower: a ServerApp and a ClientApp in `run_simulation` (Ray), the quickest of its ways in: `flwr run` builds a package and starts a server first."""

from __future__ import annotations

import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from flwr.simulation import run_simulation

from benchmarks.peers.common import SETTING
from benchmarks.peers.flower import client, server

if __name__ == "__main__":
    run_simulation(
        server_app=server.app,
        client_app=client.app,
        num_supernodes=SETTING.sites,
        backend_config={
            "init_args": {"num_cpus": SETTING.workers, "object_store_memory": 400_000_000, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
