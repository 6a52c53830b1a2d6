"""Create or update the work pools and the deployments of a federation: one of each per site, and the coordinator's.

    python deployments/deploy_sites.py federation.yaml

On the Prefect server that PREFECT_API_URL names. `fedflow deploy` does the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedflow.errors import FedflowError, UserError
from fedflow.prefect.api import connect
from fedflow.prefect.deploy import deploy_federation
from fedflow.recipe import Federation, Recipe


def main(args: Sequence[str] | None = None) -> int:
    """0, 1 for what failed, 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("federation", type=Path, metavar="FEDERATION", help="the sites, YAML or JSON")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="what the form for a new run is filled with")
    parser.add_argument(
        "--site-type",
        default="fedflow-site",
        metavar="TYPE",
        help="worker type of new site pools: fedflow-site (default), process, docker, kubernetes",
    )
    given = parser.parse_args(args)
    try:
        federation = Federation.load(given.federation)
        recipe = Recipe.load(given.recipe) if given.recipe else None
        with connect() as client:
            deployments = deploy_federation(client, federation, recipe=recipe, site_type=given.site_type)
            for name in dict.fromkeys(
                [federation.coordinator_pool, *(site.work_pool for site in federation.workplaces)]
            ):
                print(f"work pool   {name}  ({client.read_work_pool(name).type})")
    except FedflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    for name in deployments:
        print(f"deployment  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
