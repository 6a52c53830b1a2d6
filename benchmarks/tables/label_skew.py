"""Rounds to a target accuracy under label skew: SGD, FedAvg, FedProx, SCAFFOLD, FedNova, FedDyn (after Table 3 of the
SCAFFOLD paper, arXiv:1910.06378). Digits, 20 sites, 20 % of them a round."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.tables.common import Run, arguments, markdown, play, spread, write

SITES = [f"site-{i:02}" for i in range(1, 21)]
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"kind": "fedavg"},
    "FedAvg": {"kind": "fedavg"},
    "FedProx": {"kind": "fedprox", "mu": 0.1},
    "SCAFFOLD": {"kind": "scaffold"},
    "FedNova": {"kind": "fednova"},
    "FedDyn": {"kind": "feddyn", "alpha": 0.1},
}


def fields(name: str, similarity: float, epochs: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe: minibatches of a fifth of a site's data, as in the paper; SGD takes one step on all of it."""
    training: dict[str, Any] = {"epochs": epochs, "batch_size": 14, "optimizer": {"lr": args.lr}}
    if name == "SGD":
        training |= {"epochs": 1, "batch_size": 10_000}
    return {
        "name": f"{name}-s{similarity:g}-e{epochs}-{seed}",
        "model": "benchmarks.tables.digits:Logistic",
        "workload": {"path": "benchmarks.tables.digits:Similar", "args": {"similarity": similarity, "seed": seed}},
        "evaluation": "benchmarks.tables.digits:HeldOut",
        "rounds": args.rounds,
        "seed": seed,
        "algorithm": ALGORITHMS[name],
        "schedule": {"kind": "sampled", "fraction": 0.2},
        "training": training,
        "early_stop": {"target": args.target},
    }


def main() -> None:
    args = arguments(
        "label_skew",
        __doc__,
        similarity={
            "type": float,
            "nargs": "+",
            "default": [0.0, 0.1, 1.0],
            "help": "shares of the data that are i.i.d.",
        },
        epochs={"type": int, "nargs": "+", "default": [1, 5, 20]},
        target={"type": float, "default": 0.9, "help": "accuracy to reach"},
        rounds={"type": int, "default": 300, "help": "after which a run is given up"},
        lr={"type": float, "default": 0.1, "help": "of every site's SGD"},
    )
    if args.tiny:
        args.seeds, args.similarity, args.epochs, args.target, args.rounds = [0], [0.0, 1.0], [1], 0.3, 5
    cells = {
        (name, similarity, epochs): [Run(fields(name, similarity, epochs, s, args), SITES) for s in args.seeds]
        for similarity in args.similarity
        for epochs in args.epochs
        for name in ALGORITHMS
        if name != "SGD" or epochs == args.epochs[0]
    }
    results = play(cells, args)
    found = {cell: [r.rounds_to("accuracy", args.target) for r in results[cell]] for cell in cells}
    write(args.out, "label-skew", _table(found, args), lambda axes: _draw(axes, found, args))


def _table(found: Mapping[tuple[str, float, int], list[int | None]], args: argparse.Namespace) -> str:
    head = ["algorithm", "epochs", *(f"similarity {s:.0%}" for s in args.similarity)]
    rows = []
    for epochs in args.epochs:
        for name in ALGORITHMS:
            if (name, args.similarity[0], epochs) in found:
                cells = [_cell(found[name, s, epochs], args.rounds) for s in args.similarity]
                rows.append([name, "one step" if name == "SGD" else str(epochs), *cells])
    about = (
        f"# Label skew\n\nRounds to {args.target:.0%} accuracy on held-out digits: median (least … most) over seeds "
        f"{', '.join(map(str, args.seeds))}. 20 sites, 4 a round, logistic regression, batches of 14, learning rate {args.lr:g}. "
        f"A run that does not get there counts as more than {args.rounds}.\n\n"
    )
    return about + markdown(head, rows)


def _cell(rounds: list[int | None], most: int) -> str:
    known = [most + 1 if r is None else r for r in rounds]
    return spread(known, 0).replace(str(most + 1), f">{most}")


def _draw(axes: Any, found: Mapping[tuple[str, float, int], list[int | None]], args: argparse.Namespace) -> None:
    for name, line in zip(ALGORITHMS, ("-", "-", "--", "-", ":", "-."), strict=True):  # some lie upon each other
        points = [
            (e, sorted(args.rounds if r is None else r for r in found[name, args.similarity[0], e]))
            for e in args.epochs
            if (name, args.similarity[0], e) in found
        ]
        axes.plot([e for e, _ in points], [r[len(r) // 2] for _, r in points], marker="o", linestyle=line, label=name)
        axes.fill_between([e for e, _ in points], [r[0] for _, r in points], [r[-1] for _, r in points], alpha=0.15)
    title = f"similarity {args.similarity[0]:.0%}"
    axes.set(xlabel="local epochs", ylabel="rounds", xscale="log", yscale="log", title=title)
    axes.minorticks_off()
    axes.set_xticks(args.epochs, [str(e) for e in args.epochs])
    rounds = [r for r in (10, 20, 50, 100, 200) if r < args.rounds]
    axes.set_yticks(rounds, [str(r) for r in rounds])
    axes.legend()


if __name__ == "__main__":
    main()
