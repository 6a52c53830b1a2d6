"""Imported by the fork server of the coordinator's worker."""

import fedflow.flows.training  # noqa: F401
