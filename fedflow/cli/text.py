"""Values as short text for people."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from fedflow.errors import one_line

__all__ = ["complain", "digest", "duration", "metric", "metrics", "size"]


def complain(text: str) -> None:
    """An error, in one line on stderr."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(one_line(text), err=True)


def metric(value: float | None) -> str:
    """Four significant digits; "n/a" for what is not finite."""
    return "n/a" if value is None else f"{value:.4g}"


def metrics(values: Mapping[str, float | None], first: str | None = None) -> str:
    """ "accuracy 0.9611  loss 0.134", `first` first."""
    names = sorted(values, key=lambda name: (name != first, name))
    return "  ".join(f"{name} {metric(values[name])}" for name in names)


def duration(seconds: float) -> str:
    """ "0.8 s", "12 s", "3m 05s", "2h 07m"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def size(count: int) -> str:
    """Bytes: "912 B", "1.4 MB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def digest(value: str | None) -> str:
    """A digest short enough for a table."""
    return "" if value is None else value[: len("blake3:") + 12]
