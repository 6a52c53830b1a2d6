"""Rounds over a store: open, step at the sites, close, aggregate, commit; each idempotent, none knowing Prefect."""

from fedflow.engine.aggregation import aggregate_round, evaluate_model, evaluate_round, read_model
from fedflow.engine.rounds import (
    Step,
    Survey,
    amend_run,
    close_round,
    commit_round,
    is_finished,
    may_close,
    next_step,
    open_round,
    start_run,
    survey,
)
from fedflow.engine.simulate import simulate
from fedflow.engine.site import SiteWork, site_step

__all__ = [
    "SiteWork",
    "Step",
    "Survey",
    "aggregate_round",
    "amend_run",
    "close_round",
    "commit_round",
    "evaluate_model",
    "evaluate_round",
    "is_finished",
    "may_close",
    "next_step",
    "open_round",
    "read_model",
    "simulate",
    "site_step",
    "start_run",
    "survey",
]
