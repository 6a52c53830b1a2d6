"""Accuracy under attack: 20 sites, 4 of which flip the signs of their updates, multiply them, or train on wrong labels,
for every robust reduction against the mean. Digits, all sites every round."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.tables.common import Result, Run, arguments, markdown, play, spread, write

SITES = [f"site-{i:02}" for i in range(1, 21)]
F = 4
ATTACKERS = SITES[2::5]  # 20 %, in different parts of the order of the labels
REDUCTIONS: Mapping[str, Any] = {
    "mean": "mean",
    "norm clipping": {"kind": "norm_clip", "max_norm": 1.0},
    "coordinate median": "median",
    "trimmed mean": {"kind": "trimmed_mean", "byzantine": F},
    "geometric median": "geometric_median",
    "Krum": {"kind": "krum", "byzantine": F},
    "Multi-Krum": {"kind": "multi_krum", "byzantine": F},
    "Bulyan": {"kind": "bulyan", "byzantine": F},
}
ATTACKS = ["none", "sign-flip", "label-flip", "scaled"]


def fields(reduction: str, attack: str, similarity: float, seed: int, rounds: int) -> dict[str, Any]:
    factor = {"sign-flip": -1.0, "scaled": -10.0}.get(attack)
    transform = {"kind": "benchmarks.tables.digits:Attack", "sites": ATTACKERS, "factor": factor}
    args = {"similarity": similarity, "seed": seed, "flipped": ATTACKERS if attack == "label-flip" else []}
    return {
        "name": f"{reduction.replace(' ', '-')}-{attack}-{seed}",
        "model": "benchmarks.tables.digits:Logistic",
        "workload": {"path": "benchmarks.tables.digits:Similar", "args": args},
        "evaluation": "benchmarks.tables.digits:HeldOut",
        "rounds": rounds,
        "seed": seed,
        "algorithm": {"kind": "fedavg", "transfer": "delta", "reduction": REDUCTIONS[reduction]},
        "transforms": [transform] if factor else [],
        "training": {"epochs": 2, "batch_size": 14, "optimizer": {"lr": 0.1}},
    }


def main() -> None:
    args = arguments(
        "attacks",
        __doc__,
        similarity={"type": float, "default": 0.5, "help": "share of the data that is i.i.d."},
        rounds={"type": int, "default": 40},
    )
    if args.tiny:
        args.seeds, args.rounds = [0], 2
    cells = {
        (name, attack): [Run(fields(name, attack, args.similarity, seed, args.rounds), SITES) for seed in args.seeds]
        for attack in ATTACKS
        for name in REDUCTIONS
    }
    found = play(cells, args)
    write(args.out, "attacks", _table(found, args), lambda axes: _draw(axes, found))


def _table(found: Mapping[tuple[str, str], list[Result]], args: argparse.Namespace) -> str:
    rows = [
        [name, *(spread([100 * r.values("accuracy")[-1] for r in found[name, a]]) for a in ATTACKS)]
        for name in REDUCTIONS
    ]
    about = (
        f"# Attacks\n\nAccuracy in percent on held-out digits after {args.rounds} rounds: median (least … most) over seeds "
        f"{', '.join(map(str, args.seeds))}. 20 sites, {len(ATTACKERS)} of them attackers, similarity {args.similarity:.0%}. Sign-flip: the "
        "update times −1; scaled: times −10; label-flip: trained on 9 − label.\n\n"
    )
    return about + markdown(["reduction", *ATTACKS], rows)


def _draw(axes: Any, found: Mapping[tuple[str, str], list[Result]]) -> None:
    for i, attack in enumerate(ATTACKS):
        heights = [sorted(100 * r.values("accuracy")[-1] for r in found[name, attack]) for name in REDUCTIONS]
        middle = [h[len(h) // 2] for h in heights]
        errors = [
            [m - h[0] for m, h in zip(middle, heights, strict=True)],
            [h[-1] - m for m, h in zip(middle, heights, strict=True)],
        ]
        axes.bar([k + 0.2 * i for k in range(len(REDUCTIONS))], middle, 0.18, yerr=errors, label=attack)
    axes.set_xticks([k + 0.3 for k in range(len(REDUCTIONS))], list(REDUCTIONS), rotation=30, ha="right")
    axes.set(ylabel="accuracy (%)")
    axes.figure.legend(loc="outside upper center", ncols=len(ATTACKS))


if __name__ == "__main__":
    main()
