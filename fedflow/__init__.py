"""Federated learning on a workflow engine."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedflow")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"
