"""NVFlare: FedAvgRecipe in its SimEnv with a thread a site. The cohort is all of its sites, its best case: sites that share threads
are swapped in and out. A round ends when the last of its sites has trained."""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

from benchmarks.peers import common
from benchmarks.peers.common import SETTING


def round_ends(stamps: Path) -> list[float]:
    last: dict[int, float] = defaultdict(float)
    for line in stamps.read_text().splitlines():
        round, seconds = line.split()
        last[int(round)] = max(last[int(round)], float(seconds))
    return [last[round] for round in sorted(last)]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="nvflare-") as folder:
        os.environ["BENCH_STAMPS"] = f"{folder}/stamps"
        recipe = FedAvgRecipe(
            name="benchmark",
            model=common.make_model(),
            min_clients=SETTING.cohort,
            num_rounds=SETTING.rounds,
            train_script=str(Path(__file__).with_name("client.py")),
        )
        started = time.time()
        env = SimEnv(num_clients=SETTING.cohort, num_threads=SETTING.cohort, workspace_root=folder)
        recipe.execute(env).get_result()
        (path,) = Path(folder).rglob("FL_global_model.pt")
        state = torch.load(path, weights_only=False)
        model = common.make_model()
        model.load_state_dict(state.get("model", state))
        common.report("NVFlare", started, round_ends(Path(f"{folder}/stamps")), model, version("nvflare"))


if __name__ == "__main__":
    main()
