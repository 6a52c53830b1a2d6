"""Work pools and deployments of a federation: made, or brought up to date."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema

from fedflow.recipe import Federation, Recipe

__all__ = ["TRAINING_FLOW", "deploy_federation", "training_deployment"]

TRAINING_FLOW = "fedflow-training"


def training_deployment(federation: Federation) -> str:
    """Full name of the deployment that runs trainings over `federation`."""
    return f"{TRAINING_FLOW}/{federation.name}"


def deploy_federation(
    client: SyncPrefectClient,
    federation: Federation,
    *,
    recipe: Recipe | None = None,
    site_type: str = "fedflow-site",
    coordinator_type: str = "fedflow-coordinator",
) -> list[str]:
    """Create or update one pool a site or region, its deployments, and the coordinator's; names of the deployments.

    site_type, coordinator_type: worker types of new pools: fedflow's own, or "process", "docker", "kubernetes"
    recipe: what the form of a new training is filled with. Deployments name the flows as modules and pull nothing: each
    worker runs the fedflow that is installed where it is.
    """
    from fedflow.flows.aggregation import aggregation
    from fedflow.flows.round import federated_round
    from fedflow.flows.site import local_training
    from fedflow.flows.training import training

    _ensure_pool(client, federation.coordinator_pool, coordinator_type)
    for pool in sorted({site.work_pool for site in federation.workplaces}):
        _ensure_pool(client, pool, site_type)
    given = {"federation": federation.model_dump(mode="json", exclude_defaults=True)}
    filled = given | ({"recipe": recipe.model_dump(mode="json")} if recipe else {})
    deployed = [
        _deploy(client, training, federation.name, federation.coordinator_pool, parameters=filled),
        _deploy(client, federated_round, federation.name, federation.coordinator_pool, parameters=given),
    ]
    for site in federation.sites:
        deployed.append(_deploy(client, local_training, site.name, site.work_pool, tags=[f"site:{site.name}"]))
    for site in federation.workplaces:
        deployed.append(_deploy(client, aggregation, site.name, site.work_pool))
    return deployed


def _ensure_pool(client: SyncPrefectClient, name: str, pool_type: str) -> None:
    """A pool that is there keeps its type, and its template if it is of another type: somebody chose them."""
    template = base_job_template(pool_type)
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=pool_type, base_job_template=template))
        return
    if template and found.type == pool_type:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def base_job_template(pool_type: str) -> dict[str, Any]:
    """fedflow's job template for pools of that type; Prefect's own where there is none."""
    file = files("fedflow") / "deployments" / "job-templates" / f"{pool_type}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _deploy(
    client: SyncPrefectClient,
    flow: Flow[Any, Any],
    name: str,
    pool: str,
    *,
    parameters: dict[str, Any] | None = None,
    tags: list[str] | None = None,
) -> str:
    """One deployment, created or updated. Schedules, limits, job variables and defaults that somebody gave it stay."""
    full, tags = f"{flow.name}/{name}", ["fedflow", *(tags or [])]
    fields: dict[str, Any] = {
        "entrypoint": f"{flow.fn.__module__}.{flow.fn.__name__}",
        "pull_steps": [],
        "work_pool_name": pool,
        "parameter_openapi_schema": parameter_schema(flow.fn).model_dump_for_openapi(),
        "enforce_parameter_schema": True,
        "description": flow.description,
    }
    try:
        found = client.read_deployment_by_name(full)
    except ObjectNotFound:
        flow_id = client.create_flow_from_name(flow.name)
        client.create_deployment(flow_id, name, parameters=parameters or {}, tags=tags, **fields)
        return full
    # Not POST, though that is an upsert: it deletes the schedules and the concurrency limit that it is not given.
    merged = {"parameters": {**found.parameters, **(parameters or {})}, "tags": sorted({*found.tags, *tags})}
    wanted = {**fields, **merged}
    if any(getattr(found, field) != value for field, value in wanted.items()):
        client.update_deployment(found.id, DeploymentUpdate(**wanted))
    return full
