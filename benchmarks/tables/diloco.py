"""DiLoCo on a byte-level GPT: held-out loss of the outer parameters by H against one site, data-parallel with a batch as
large as all sites' together, and FedAvg; what is moved; and variations of everything else (after arXiv:2311.08105)."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.tables.common import ROOT, Result, Run, arguments, markdown, play, spread, tell, write
from fedflow.engine import read_model, simulate
from fedflow.recipe import Recipe

BATCH = 8
PLAIN: Mapping[str, Any] = {"outer_optimizer": "sgd", "outer_learning_rate": 1.0}  # averages parameters

sys.path.insert(0, str(ROOT / "examples/gpt"))  # where `workload` is found


@dataclass(frozen=True)
class Setting:
    """One row. H: steps between two synchronisations of a parameter; rounds: in these H steps; k: sites; batch: factor on the
    batch size; pooled: one site has all data."""

    H: int
    rounds: int = 1
    k: int = 4
    batch: int = 1
    pooled: bool = False
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[Mapping[str, Any], ...] = ()
    contribute: float = 1.0


def settings(args: argparse.Namespace) -> dict[str, Setting]:
    """Name -> setting; the variations are of `args.h`."""
    H, fedavg = args.h, {"kind": "fedavg"}
    streaming = {"kind": "streaming_diloco"}
    found = {
        "one site": Setting(H, k=1, algorithm=PLAIN),
        "data-parallel, 4 × batch": Setting(H, k=1, batch=4, pooled=True, algorithm=PLAIN),
    }
    found |= {f"DiLoCo, H = {h}": Setting(h) for h in args.all_h if h <= args.steps}
    found |= {f"outer SGD, H = {h}": Setting(h, algorithm=PLAIN) for h in args.all_h if h <= args.steps}
    found |= {
        "FedAvg": Setting(H, algorithm=fedavg),
        "outer SGD with momentum": Setting(H, algorithm={"outer_optimizer": "sgdm", "outer_learning_rate": 0.3}),
        "inner state reset": Setting(H, algorithm={"preserve_optimizer_state": False}),
        "int8": Setting(H, transforms=({"kind": "quantise", "bits": 8},)),
        "int4": Setting(H, transforms=({"kind": "quantise", "bits": 4},)),
        "int8 both ways": Setting(H, transforms=({"kind": "quantise", "bits": 8, "broadcast": True},)),
        "int4 both ways": Setting(H, transforms=({"kind": "quantise", "bits": 4, "broadcast": True},)),
        "streaming, 2 fragments": Setting(H, rounds=2, algorithm={**streaming, "fragments": 2}),
        "streaming, 2 fragments, merged at once": Setting(
            H, rounds=2, algorithm={**streaming, "fragments": 2, "tau": 0, "alpha": 0.0}
        ),
        "streaming, 5 fragments": Setting(H, rounds=5, algorithm={**streaming, "fragments": 5}),
        "streaming, 2 fragments, int4": Setting(
            H, rounds=2, algorithm={**streaming, "fragments": 2}, transforms=({"kind": "quantise", "bits": 4},)
        ),
        "30 % of updates dropped": Setting(H, contribute=0.7),
        "50 % of updates dropped": Setting(H, contribute=0.5),
        "k = 1": Setting(H, k=1),
        "k = 2": Setting(H, k=2),
        "k = 8": Setting(H, k=8),
    }
    return found


def fields(
    name: str, s: Setting, seed: int, args: argparse.Namespace, *, lr: float, checkpoint: str | None
) -> dict[str, Any]:
    steps = s.H // s.rounds
    diloco = {"kind": "diloco", "local_steps_per_round": steps, "transfer": "delta"}
    is_fedavg = s.algorithm.get("kind") == "fedavg"
    optimizer = {"kind": "adamw", "lr": lr, "weight_decay": 0.1, "betas": [0.9, 0.99]}
    return {
        "name": "".join(c if c.isalnum() else "-" for c in f"{name}-{seed}").strip("-"),
        "model": "workload:ByteGPT",
        "workload": {"path": "workload:Sources", "args": {"pooled": s.pooled, "megabytes": args.megabytes}},
        "evaluation": {"path": "workload:HeldOut", "args": {"megabytes": args.megabytes}},
        "checkpoint": checkpoint,
        "rounds": max(1, args.steps // steps),
        "seed": seed,
        "algorithm": dict(s.algorithm) if is_fedavg else {**diloco, **s.algorithm},
        "transforms": list(s.transforms),
        "schedule": {"kind": "sampled", "fraction": s.contribute} if s.contribute < 1 else "everyone",
        "training": {"batch_size": BATCH * s.batch, "optimizer": optimizer} | ({"steps": s.H} if is_fedavg else {}),
        "key_metric": {"name": "loss", "mode": "min"},
    }


def pretrained(args: argparse.Namespace) -> str:
    """The model that every run begins with, as in the paper: all data at one place, twice the batch, trained here unless it is
    there from another time."""
    alone = Setting(max(1, args.pretraining // 10), k=1, batch=2, pooled=True, algorithm=PLAIN)
    length = argparse.Namespace(steps=args.pretraining, megabytes=args.megabytes)
    recipe = Recipe.load(fields("pretraining", alone, 0, length, lr=0.003, checkpoint=None))
    path = args.results.parent / f"diloco-{recipe.digest().partition(':')[2][:12]}.safetensors"
    if not path.exists():
        tell(f"pretraining: {args.pretraining} steps; {path}")
        journal = simulate(recipe, ["site-1"])
        manifest = journal.head(("train",))
        assert manifest
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t for group in read_model(journal, manifest).values() for n, t in group.items()}, f"{path}.new")
        Path(f"{path}.new").replace(path)
    return os.path.relpath(path)


def main() -> None:
    args = arguments(
        "diloco",
        __doc__,
        steps={"type": int, "default": 500, "help": "of every site"},
        h={"type": int, "default": 50, "help": "H of the variations"},
        all_h={"type": int, "nargs": "+", "default": [1, 5, 10, 25, 50, 100, 250]},
        pretraining={"type": int, "default": 3000, "help": "steps before all that"},
        lr={"type": float, "default": 0.0005, "help": "of AdamW at the sites"},
        megabytes={"type": float, "default": 4.0, "help": "of source text"},
        subset={
            "action": "store_true",
            "help": "one site, data-parallel, FedAvg, H of the variations and int8, for the first seed",
        },
    )
    if args.tiny:
        args.seeds, args.steps, args.h, args.all_h, args.megabytes = [0], 10, 10, [5, 10], 0.3
        args.pretraining = 10
    chosen = settings(args)
    if args.subset:
        wanted = ("one site", "data-parallel, 4 × batch", "FedAvg", f"DiLoCo, H = {args.h}", "int8")
        chosen, args.seeds = {name: chosen[name] for name in wanted}, args.seeds[:1]
    start = pretrained(args)
    cells = {
        name: [
            Run(fields(name, s, seed, args, lr=args.lr, checkpoint=start), [f"site-{i}" for i in range(1, s.k + 1)])
            for seed in args.seeds
        ]
        for name, s in chosen.items()
    }
    found = play(cells, args)
    write(args.out, "diloco", _table(found, chosen, args), lambda axes: _draw(axes, found, chosen))


def _table(found: Mapping[str, list[Result]], chosen: Mapping[str, Setting], args: argparse.Namespace) -> str:
    rows = []
    for name, results in found.items():
        moved = results[0].bytes_up + results[0].bytes_down
        alone = chosen[name].k == 1
        rows.append(
            [
                name,
                str(chosen[name].k),
                spread([r.values("loss")[-1] for r in results], 4),
                "–" if alone else f"{results[0].bytes_up / 1e6:.2f}",
                "–" if alone else f"{moved / 1e6:.2f}",
            ]
        )
    about = (
        f"# DiLoCo\n\nA byte-level GPT of 119 thousand parameters on {args.megabytes:g} MB of Python's standard library, trained for "
        f"{args.pretraining} steps on all data at one place; then {args.steps} steps of AdamW at every site, batches of {BATCH} × 64 bytes. "
        f"DiLoCo's outer step is the paper's (Nesterov, η = 0.7, μ = 0.9), outer SGD with η = 1 averages parameters. Variations have H = {args.h}; "
        "streaming: every fragment each H steps, τ = 1, α = 0.5. Held-out loss of the outer parameters in nats a byte, median "
        f"(least … most) over seeds {', '.join(map(str, args.seeds))}; bytes as measured at the store, of one run. Data-parallel moves what H = 1 "
        "moves.\n\n"
    )
    return about + markdown(["", "sites", "loss", "MB of updates", "MB moved"], rows)


def _draw(axes: Any, found: Mapping[str, list[Result]], chosen: Mapping[str, Setting]) -> None:
    """Loss by H; what has no H as lines across."""
    last = {name: sorted(r.values("loss")[-1] for r in results) for name, results in found.items()}
    for kind, line in (("DiLoCo", "-"), ("outer SGD", "--")):
        by_h = sorted((chosen[name].H, values) for name, values in last.items() if name.startswith(f"{kind}, H"))
        axes.plot([h for h, _ in by_h], [statistics.median(v) for _, v in by_h], line, marker="o", label=kind)
        axes.fill_between([h for h, _ in by_h], [v[0] for _, v in by_h], [v[-1] for _, v in by_h], alpha=0.2)
    for name, line in (("one site", ":"), ("data-parallel, 4 × batch", "-.")):
        axes.axhline(statistics.median(last[name]), color="gray", linestyle=line, label=name)
    axes.set(xlabel="H, steps between two synchronisations", ylabel="held-out loss (nats a byte)", xscale="log")
    axes.legend()


if __name__ == "__main__":
    main()
