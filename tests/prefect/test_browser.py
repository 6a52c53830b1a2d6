"""What a person sees in the Prefect UI: a run, its rounds, its artifacts."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import ArtifactSort

from fedflow.environments.base import Run
from fedflow.prefect.api import connect, find_runs
from fedflow.prefect.artifacts import artifact_key
from fedflow.prefect.deploy import training_deployment
from fedflow.store.journal import list_runs
from tests import builders
from tests.prefect.conftest import Poc
from tests.prefect.test_kills import MINUTES

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds for a page to show something


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "install Chromium, from the system's packages"
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=chromium, args=QUIET) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


def picture(page: Page, name: str) -> None:
    """A screenshot, into the folder that SCREENSHOTS names, if it does."""
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_a_run_its_rounds_and_its_artifacts_can_be_read(poc: Poc, page: Page) -> None:
    run = poc.execute(builders.recipe(key_metric={"name": "loss", "mode": "min"}), "looked-at")
    run.result(MINUTES)
    page.goto(str(run.backend.ui()))
    expect(page.get_by_text("looked-at").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Completed").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("finished after 2 rounds").first).to_be_visible(timeout=PATIENCE)
    picture(page, "run")
    base = f"http://127.0.0.1:{poc.env.server.port}"
    with connect(poc.env.api_url) as client:
        runs = find_runs(client, "fedflow", states=list(StateType))
    held = next(r for r in runs if r.name == "looked-at · round 001")
    page.goto(f"{base}/runs/flow-run/{held.id}")
    expect(page.get_by_text("looked-at · round 001").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("committed blake3").first).to_be_visible(timeout=PATIENCE)
    picture(page, "round")
    sites = artifact_key(poc.env.federation.name, "sites")
    for key, shown in (("looked-at-round", "site-1"), ("looked-at-report", "Best loss"), (sites, "there")):
        page.goto(f"{base}/artifacts/artifact/{artifact(poc, key)}")
        expect(page.get_by_text(shown).first).to_be_visible(timeout=PATIENCE)
        picture(page, key)


def artifact(poc: Poc, key: str) -> str:
    """The id of the newest artifact of that key."""
    with connect(poc.env.api_url) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC
        )
    return str(found[0].id)


def form_field(page: Page, ui: str, label: str) -> Locator:
    """The input below that label; the first version of the UI does not tie the two together."""
    if ui == "v2":
        return page.get_by_label(label, exact=True).first
    header = page.locator(f'> .p-label__header .schema-form-property__label:text-is("{label}")')
    return page.locator(".p-label", has=header).locator("input, textarea").first


@pytest.mark.parametrize("ui", ["v1", "v2"])
def test_a_run_is_started_from_the_form(poc: Poc, page: Page, ui: str) -> None:
    """The form of the training's deployment is filled in and submitted; the run trains as it says."""
    poc.env.deploy(builders.recipe())
    with connect(poc.env.api_url) as client:
        deployment = client.read_deployment_by_name(training_deployment(poc.env.federation))
    prefix = "/v2" if ui == "v2" else ""
    base = f"http://127.0.0.1:{poc.env.server.port}"
    page.goto(f"{base}{prefix}/deployments/deployment/{deployment.id}/run")
    filled = {"Rounds": "1", "Name": f"form-{ui}"}
    for label, value in filled.items():
        form_field(page, ui, label).fill(value)
    for label, value in filled.items():
        expect(form_field(page, ui, label)).to_have_value(value)
    picture(page, f"form-{ui}")
    page.get_by_role("button", name="Submit").click()
    run = started_run(poc, f"form-{ui}-")
    summary = run.result(MINUTES)
    assert summary.recipe == builders.recipe(name=f"form-{ui}", rounds=1)
    assert [r.round for r in summary.rounds] == [0]


def started_run(poc: Poc, prefix: str) -> Run:
    """The run whose name begins so, once its coordinator has begun it and tagged its flow run; which may be over by then."""
    until = time.monotonic() + MINUTES
    while time.monotonic() < until:
        for name in list_runs(poc.env.store):
            run = poc.env.attach(name)
            if name.startswith(prefix) and run.backend.trainings(list(StateType)):
                return run
        threading.Event().wait(0.5)
    raise AssertionError(f"no run named {prefix}… began")
