"""Runs as pictures: one in detail, or several compared."""

from fedflow.plot.figure import SUFFIXES, check_picture
from fedflow.plot.matrix import plot_matrix
from fedflow.plot.run import plot_run
from fedflow.plot.runs import AXES, Group, groups_of, plot_runs, short_names

__all__ = [
    "AXES",
    "SUFFIXES",
    "Group",
    "check_picture",
    "groups_of",
    "plot_matrix",
    "plot_run",
    "plot_runs",
    "short_names",
]
