"""A deployed federation with keys: what each side signs, and what becomes of a site whose key is not the pinned one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedflow.environments.prod import ProdEnv
from fedflow.store.signing import PrivateKey
from tests import builders
from tests.deployed import ROOT, Deployed
from tests.prefect.test_kills import MINUTES
from tests.servers import PrefectServer, S3Server

pytestmark = pytest.mark.timeout(900)


def test_a_deployed_round_is_signed_and_a_site_with_another_key_is_left_out(
    prefect_api: PrefectServer, s3: S3Server, tmp_path: Path
) -> None:
    """The bits are those of a federation without keys; a federation file that pins another key is told by the site."""
    paths = {"PYTHONPATH": str(ROOT)}
    with Deployed(tmp_path, prefect_api, s3, sites=2, environment=paths, keys=True, name="signed") as deployed:
        deployed.await_workers()
        federation = deployed.env.federation
        recipe = builders.recipe(rounds=1, quorum=1)
        run = deployed.env.execute(recipe, run_id="signed")
        simulated = builders.run(recipe, sites=federation.names)
        assert run.result(MINUTES).model_digest == builders.head(simulated).model_digest
        records = [key for key in run.store.list("sites") if "/signed/" in key and key.endswith(".json")]
        records += [key for key in run.store.list("public/signed") if key.endswith(".json")]
        assert len(records) == 2 + 4 and all(json.loads(run.store.get(key))["signature"] for key in records)

        other = PrivateKey.create(tmp_path / "other.key").public
        sites = [
            site if site.name == "signed-1" else site.model_copy(update={"key": other}) for site in federation.sites
        ]
        pinned = ProdEnv(
            federation.model_copy(update={"sites": sites}), home=tmp_path / "other", api_url=prefect_api.url
        )
        (held,) = pinned.execute(recipe, run_id="other").result(MINUTES).rounds
        assert list(held.sites) == ["signed-1"]
        assert "which the federation pins for signed-2; have the coordinator pin" in held.excluded["signed-2"]
        # by its flow run: a failure that the pinned key did not sign is not read
        assert other in held.excluded["signed-2"]
