"""DiLoCo on a byte-level GPT: held-out loss of the outer parameters by H against one site, data-parallel with a batch as
large as all sites' together, and FedAvg; what is moved; and variations of everything else (after arXiv:2311.08105)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.tables.common import ROOT, Result, Run, arguments, markdown, play, spread, write

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
    H, fedavg, plain = args.h, {"kind": "fedavg"}, {"outer_optimizer": "sgd", "outer_learning_rate": 1.0}
    streaming = {"kind": "streaming_diloco"}
    found = {
        "one site": Setting(H, k=1, algorithm=plain),
        "data-parallel, 4 × batch": Setting(H, k=1, batch=4, pooled=True, algorithm=plain),
    }
    found |= {f"DiLoCo, H = {h}": Setting(h) for h in args.all_h if h <= args.steps}
    found |= {
        "FedAvg": Setting(H, algorithm=fedavg),
        "outer SGD": Setting(H, algorithm=plain),
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


def fields(name: str, s: Setting, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    steps = s.H // s.rounds
    diloco = {"kind": "diloco", "local_steps_per_round": steps, "transfer": "delta"}
    is_fedavg = s.algorithm.get("kind") == "fedavg"
    optimizer = {"kind": "adamw", "lr": args.lr, "weight_decay": 0.1, "betas": [0.9, 0.99]}
    return {
        "name": "".join(c if c.isalnum() else "-" for c in f"{name}-{seed}").strip("-"),
        "model": "workload:ByteGPT",
        "workload": {"path": "workload:Sources", "args": {"pooled": s.pooled, "megabytes": args.megabytes}},
        "evaluation": {"path": "workload:HeldOut", "args": {"megabytes": args.megabytes}},
        "rounds": max(1, args.steps // steps),
        "seed": seed,
        "algorithm": dict(s.algorithm) if is_fedavg else {**diloco, **s.algorithm},
        "transforms": list(s.transforms),
        "schedule": {"kind": "sampled", "fraction": s.contribute} if s.contribute < 1 else "everyone",
        "training": {"batch_size": 16 * s.batch, "optimizer": optimizer} | ({"steps": s.H} if is_fedavg else {}),
        "key_metric": {"name": "loss", "mode": "min"},
    }


def main() -> None:
    args = arguments(
        "diloco",
        __doc__,
        steps={"type": int, "default": 500, "help": "of every site"},
        h={"type": int, "default": 50, "help": "H of the variations"},
        all_h={"type": int, "nargs": "+", "default": [1, 5, 10, 25, 50, 100, 250]},
        lr={"type": float, "default": 0.003, "help": "of AdamW at the sites"},
        megabytes={"type": float, "default": 4.0, "help": "of source text"},
        subset={
            "action": "store_true",
            "help": "one site, data-parallel, FedAvg, H of the variations and int8, for the first seed",
        },
    )
    if args.tiny:
        args.seeds, args.steps, args.h, args.all_h, args.megabytes = [0], 10, 10, [5, 10], 0.3
    chosen = settings(args)
    if args.subset:
        wanted = ("one site", "data-parallel, 4 × batch", "FedAvg", f"DiLoCo, H = {args.h}", "int8")
        chosen, args.seeds = {name: chosen[name] for name in wanted}, args.seeds[:1]
    cells = {
        name: [Run(fields(name, s, seed, args), [f"site-{i}" for i in range(1, s.k + 1)]) for seed in args.seeds]
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
        f"# DiLoCo\n\nA byte-level GPT of 119 thousand parameters on {args.megabytes:g} MB of Python's standard library, {args.steps} steps of "
        f"AdamW at every site, batches of 16 × 64 bytes. Streaming: every fragment each {args.h} steps, τ = 1, α = 0.5. Held-out loss of the outer parameters in nats a byte, median (least … most) over "
        f"seeds {', '.join(map(str, args.seeds))}; bytes as measured at the store, of one run. Variations have H = {args.h}. Data-parallel moves what "
        "H = 1 moves.\n\n"
    )
    return about + markdown(["", "sites", "loss", "MB of updates", "MB moved"], rows)


def _draw(axes: Any, found: Mapping[str, list[Result]], chosen: Mapping[str, Setting]) -> None:
    for name, results in found.items():
        if name.startswith(("one", "data", "DiLoCo", "FedAvg", "streaming")):
            values, steps = results[0].values("loss"), chosen[name].H // chosen[name].rounds
            axes.plot([steps * (i + 1) for i in range(len(values))], values, label=name)
    axes.set(xlabel="steps of every site", ylabel="held-out loss (nats a byte)")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    main()
