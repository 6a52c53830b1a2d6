"""A site's worker: Prefect's process worker on the site's pool, whose children find the site's configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedflow.recipe import SiteConfig

__all__ = ["command", "environment", "start"]


def command(pool: str, name: str) -> list[str]:
    """The worker's command line."""
    return [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--type", "process"]


def environment(config: SiteConfig, path: Path) -> dict[str, str]:
    """What the worker's environment needs besides the caller's own."""
    api = {"PREFECT_API_URL": config.api_url} if config.api_url else {}
    return {SiteConfig.environment_variable: str(path.resolve()), **api}


def start(config: SiteConfig, path: Path) -> None:
    """Become the worker of `config`'s site. Does not return."""
    args = command(config.work_pool, config.name)
    os.execve(args[0], args, {**os.environ, **environment(config, path)})
