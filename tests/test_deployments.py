"""The deployment files: each is read by what reads it in earnest; one test deploys them to a real server."""

import asyncio
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import click
import prefect
import pytest
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import S3Store
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flows import load_flow_from_entrypoint
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.settings.models.root import Settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect.workers.process import ProcessJobConfiguration
from typer.main import get_command

import fedflow
from fedflow.cli.app import app
from fedflow.cli.recipes import check_recipe
from fedflow.deployments import deploy_sites
from fedflow.prefect.api import WORKER_SILENCE
from fedflow.prefect.deploy import training_deployment
from fedflow.recipe import Federation, Recipe, SiteConfig
from fedflow.registry import resolve
from tests.compose import FILES, ComposeStore, read, services, weed_program
from tests.servers import PrefectServer

ROOT = Path(__file__).parents[1]


def test_the_link_at_the_root_leads_to_the_package() -> None:
    assert (ROOT / "deployments").resolve() == FILES.resolve()


# -- prefect.yaml ------------------------------------------------------------------------------------------------------
def deployments() -> list[tuple[dict[str, Any], Flow[Any, Any]]]:
    """What prefect.yaml deploys, each with its flow."""
    return [(d, load_flow_from_entrypoint(d["entrypoint"])) for d in read("prefect.yaml")["deployments"]]


def test_prefect_yaml_has_the_deployment_that_a_run_looks_for() -> None:
    names = [f"{flow.name}/{d['name']}" for d, flow in deployments()]
    assert len(names) == len(set(names)) == 2
    assert training_deployment(Federation.load(FILES / "federation.example.yaml")) in names


def test_prefect_yaml_pulls_nothing_and_names_modules() -> None:
    assert read("prefect.yaml")["pull"] == []
    for deployment, flow in deployments():
        assert deployment["pull"] == []
        assert deployment["entrypoint"] == f"{flow.fn.__module__}.{flow.fn.__name__}"


def test_its_parameters_are_the_examples() -> None:
    for deployment, flow in deployments():
        given = deployment["parameters"]
        assert Federation.model_validate(given["federation"]) == Federation.load(FILES / "federation.example.yaml")
        if "recipe" in given:
            assert Recipe.model_validate(given["recipe"]) == Recipe.load(FILES / "recipe.example.yaml")
        schema = parameter_schema(flow).model_dump_for_openapi()
        validate(given, schema, raise_on_error=True, ignore_required=True)  # as the server will


def test_its_schedule_is_a_cron_that_starts_nothing_unasked() -> None:
    (schedule,) = deployments()[0][0]["schedules"]
    assert CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert schedule["slug"] and schedule["active"] is False


# -- examples ----------------------------------------------------------------------------------------------------------
def test_the_example_recipe_could_start() -> None:
    recipe, federation = Recipe.load(FILES / "recipe.example.yaml"), Federation.load(FILES / "federation.example.yaml")
    check_recipe(recipe, federation.names)
    assert recipe.quorum is not None and recipe.quorum < len(federation.sites)


def test_the_example_site_is_one_of_the_example_federation() -> None:
    federation, site = Federation.load(FILES / "federation.example.yaml"), SiteConfig.load(FILES / "site.example.yaml")
    assert site.work_pool in [known.work_pool for known in federation.sites if known.name == site.name]
    assert (site.store, site.store_options) == (federation.store, federation.store_options)
    assert Path(site.state).is_absolute()  # a flow run's working directory is a temporary one


def test_the_example_site_allows_what_the_example_recipe_names() -> None:
    site, recipe = SiteConfig.load(FILES / "site.example.yaml"), Recipe.load(FILES / "recipe.example.yaml")
    for name in (recipe.model.path, recipe.workload.path):
        resolve("workloads", name, field="workload", aliases=site.workloads, allowed=site.allowed_imports)


# -- settings ----------------------------------------------------------------------------------------------------------
NOT_PREFECTS = re.compile(r"FEDFLOW_\w+|DO_NOT_TRACK|SSL_CERT_FILE|AWS_\w+|POSTGRES_\w+|FORWARDED_ALLOW_IPS")
SETTINGS = ["coordinator.env", "site.env"]


def assignments(name: str, *, commented: bool = False) -> dict[str, str]:
    """NAME=value lines of an environment file; with `commented` those that are only suggested."""
    lines = (FILES / name).read_text().splitlines()
    found = [m for line in lines if (m := re.fullmatch(r"(# )?([A-Z][A-Z0-9_]*)=(.*)", line))]
    assert all(m or not line or line.startswith("#") for line in lines for m in [re.match(r"[A-Z][A-Z0-9_]*=", line)])
    return {m[2]: m[3] for m in found if bool(m[1]) == commented}


def check_settings(given: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a setting of the installed Prefect, with a value that it takes."""
    ours = {name: value for name, value in given.items() if not NOT_PREFECTS.fullmatch(name)}
    with monkeypatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        known = Settings().to_environment_variables(exclude_unset=True).keys()
    assert ours.keys() <= known, sorted(ours.keys() - known)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_exist_and_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    active = assignments(f"settings/{name}")
    assert {"PREFECT_API_URL", "PREFECT_CLIENT_MAX_RETRIES", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"} <= active.keys()
    assert 8 <= int(active["PREFECT_CLIENT_MAX_RETRIES"]) <= 10
    check_settings(active, monkeypatch)
    suggested = assignments(f"settings/{name}", commented=True)
    check_settings({key: value or "x" for key, value in suggested.items()}, monkeypatch)
    assert "PREFECT_API_AUTH_STRING" in suggested  # and so not in the file


def test_heartbeats_are_the_same_everywhere_and_as_fedflow_counts_them() -> None:
    coordinator, site = (assignments(f"settings/{name}") for name in SETTINGS)
    assert coordinator["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == site["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    assert coordinator["PREFECT_WORKER_HEARTBEAT_SECONDS"] == site["PREFECT_WORKER_HEARTBEAT_SECONDS"]
    assert 3 * int(site["PREFECT_WORKER_HEARTBEAT_SECONDS"]) < WORKER_SILENCE.total_seconds()


# -- a site's worker as a service --------------------------------------------------------------------------------------
UNIT = FILES / "site" / "fedflow-site.service"


def unit() -> dict[str, dict[str, str]]:
    """Section -> setting -> its value."""
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(UNIT)
    return {name: dict(found[name]) for name in found.sections()}


def test_the_unit_starts_a_command_that_there_is_and_stops_the_worker_alone() -> None:
    service = unit()["Service"]
    program, *arguments = service["ExecStart"].split()
    assert Path(program).name == "fedflow" and arguments[:2] == ["site", "start"]
    get_command(app).make_context("fedflow", [*arguments[:2], "--help"], resilient_parsing=True)
    assert service["Restart"] == "always" and service["KillMode"] == "mixed"
    site = SiteConfig.load(FILES / "site.example.yaml")
    assert site.state.startswith(f"/var/lib/{service['StateDirectory']}/")
    home = assignments("settings/site.env")["PREFECT_HOME"]
    assert home.startswith(f"/var/lib/{service['StateDirectory']}/")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With a program that is there in place of the one that a site installs."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/fedflow/bin/fedflow", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    about_it = [line for line in done.stderr.splitlines() if UNIT.stem in line]
    assert (done.returncode, about_it) == (0, [])


def test_the_sites_image_starts_its_worker_from_the_image_of_the_server() -> None:
    lines = (FILES / "site" / "Containerfile").read_text().splitlines()
    said = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    assert said["FROM"] == services()["coordinator"]["image"]
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert unit()["Service"]["ExecStart"].partition("/bin/")[2] in json.loads(said["CMD"])[-1]


# -- compose -----------------------------------------------------------------------------------------------------------
VARIABLE = re.compile(r"\$\{(\w+)(:\?[^}]*)?\}")


def test_compose_services_restart_are_watched_and_wait_for_each_other() -> None:
    found = services()
    assert found.keys() == {"postgres", "prefect", "gate", "store", "coordinator", "proxy"}
    for name, service in found.items():
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"} and other in found.keys() - {name}


def test_compose_images_are_pinned() -> None:
    for service in services().values():
        assert re.fullmatch(r"[a-z/]+:\d+(\.\d+)+(-[a-z]+)?", service["image"])
    for name in ("prefect", "gate", "coordinator"):
        assert services()[name]["image"] == f"fedflow:{fedflow.__version__}"
        assert (FILES / services()[name]["build"] / "Dockerfile").is_file()
    weed = subprocess.run([weed_program(), "version"], capture_output=True, text=True, check=True).stdout.split()[2]
    assert services()["store"]["image"].endswith(f":{weed}")  # the one that the tests run


def test_compose_only_names_what_is_there() -> None:
    compose = read("compose.yaml")
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (
                source in ("./tls", "./secrets/proxy") or (FILES / source).is_file()
                if source.startswith(".")
                else source in compose["volumes"]
            )
        assert set(service["networks"]) <= compose["networks"].keys()
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
        assert "env_file" not in service or (FILES / service["env_file"]).is_file()


def test_only_the_proxy_is_reachable_from_outside() -> None:
    assert [name for name, service in services().items() if "ports" in service] == ["proxy"]
    assert read("compose.yaml")["networks"]["backend"] == {"internal": True}


def test_compose_variables_are_those_of_the_example_and_required() -> None:
    used = VARIABLE.findall(re.sub(r"^\s*#.*$", "", (FILES / "compose.yaml").read_text(), flags=re.M))
    assert {name for name, _ in used} == assignments(".env.example").keys()
    assert all(required for _, required in used)


def test_no_secret_is_in_a_file() -> None:
    for service in services().values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH_STRING", name):
                assert VARIABLE.fullmatch(value)
    for name in (".env.example", *(f"settings/{name}" for name in SETTINGS)):
        given = assignments(name) | assignments(name, commented=True)
        assert not [key for key, value in given.items() if value and re.search("PASSWORD|SECRET|AUTH_STRING", key)]
    assert {i["credentials"][0]["secretKey"] for i in read("s3.example.json")["identities"]} == {"REPLACE"}


def test_compose_settings_exist_and_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in services().values():
        given = {name: VARIABLE.sub("x", value) for name, value in service.get("environment", {}).items()}
        check_settings(given, monkeypatch)


def test_the_coordinators_worker_runs_on_the_example_federations_pool() -> None:
    command = services()["coordinator"]["command"]
    assert command[command.index("--pool") + 1] == Federation.load(FILES / "federation.example.yaml").coordinator_pool


def test_the_proxy_leads_to_the_services_and_lets_websockets_through() -> None:
    conf = (FILES / "nginx.conf").read_text()
    assert set(re.findall(r"set \$\w+ http://(\w+:\d+);", conf)) == {"prefect:4200", "gate:4300", "store:8333"}
    assert {f"{port}:{port}" for port in re.findall(r"listen (\d+)[ ;]", conf)} == set(services()["proxy"]["ports"])
    assert re.search(
        r"proxy_set_header Upgrade \$http_upgrade;\s+proxy_set_header Connection \$connection_upgrade;", conf
    )
    assert conf.count("{") == conf.count("}")


# -- the store of compose.yaml, for real -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeStore]:
    server = ComposeStore(tmp_path_factory.mktemp("store"))
    try:
        server.start()
        yield server
    finally:
        server.kill()  # asked to stop, it takes half a minute


def test_a_site_reads_what_is_public_and_writes_its_own(store: ComposeStore) -> None:
    store.as_("coordinator").put("public/r/run.json", b"{}", mode="create")
    site = store.as_("hospital-a")
    assert bytes(site.get("public/r/run.json").bytes()) == b"{}"
    assert [found["path"] for part in site.list("public/r") for found in part] == ["public/r/run.json"]
    with pytest.raises(FileNotFoundError):
        site.get("public/r/nothing.json")
    site.put("sites/hospital-a/r/update.json", b"1", mode="create")
    assert bytes(site.get("sites/hospital-a/r/update.json").bytes()) == b"1"
    assert [found["path"] for part in site.list("sites/hospital-a") for found in part] == [
        "sites/hospital-a/r/update.json"
    ]
    site.delete("sites/hospital-a/r/update.json")


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda site: site.put("public/r/plan.json", b"forged"),
        lambda site: site.put("sites/hospital-b/r/update.json", b"forged"),
        lambda site: site.put("server/r/manifest.json", b"forged"),
        lambda site: site.get("server/r/state"),
        lambda site: site.get("sites/hospital-b/r/update.json"),
        lambda site: site.delete("server/r/state"),
        lambda site: list(site.list()),
        lambda site: list(site.list("sites/hospital-b")),
    ],
)
def test_a_site_can_do_nothing_else(store: ComposeStore, forbidden: Callable[[S3Store], object]) -> None:
    with pytest.raises(BaseError) as error:
        forbidden(store.as_("hospital-a"))
    assert isinstance(error.value, PermissionDeniedError) or "AccessDenied" in str(error.value)


def test_the_policy_for_s3_allows_a_site_what_the_stores_identity_does() -> None:
    """Object by object: the identity's actions, and the policy's statements as AWS reads them."""
    (identity,) = [i for i in read("s3.example.json")["identities"] if i["name"] == "hospital-a"]
    kinds = {"s3:GetObject": "Read", "s3:PutObject": "Write", "s3:ListBucket": "List"}
    allowed = set()
    for statement in read("s3-policy.example.json")["Statement"]:
        assert statement["Effect"] == "Allow" and "*" not in str(statement["Action"])
        where = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix") or statement["Resource"]
        for action in [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]:
            for path in [where] if isinstance(where, str) else where:
                if action in kinds:
                    allowed.add(f"{kinds[action]}:fedflow/{path.removeprefix('arn:aws:s3:::fedflow/')}")
    assert allowed == set(identity["actions"])


def test_the_stores_healthcheck_gets_its_answer(store: ComposeStore) -> None:
    check = services()["store"]["healthcheck"]["test"][-1]
    path = re.search(r"http://127\.0\.0\.1:8333(/\S*)", check)
    assert path is not None
    with urlopen(f"http://127.0.0.1:{store.port}{path[1]}", timeout=5) as answer:
        assert answer.status == 200


# -- job templates -----------------------------------------------------------------------------------------------------
HOSTILE = {"command": "touch pwned", "env": {"FEDFLOW_SITE_CONFIG": "/evil"}, "working_dir": "/evil", "image": "evil"}
KINDS = ["process", "docker", "kubernetes"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_template_is_valid_and_its_overrides_are_few(kind: str) -> None:
    template = read(f"job-templates/{kind}.json")
    WorkPoolCreate(name="pool", type=kind, base_job_template=template)  # the server's own check of the placeholders
    collections = Path(prefect.__file__).parent / "server/api/collections_data/views/aggregate-worker-metadata.json"
    workers = {name: worker for part in json.loads(collections.read_text()).values() for name, worker in part.items()}
    prefects = workers[kind]["default_base_job_configuration"]
    assert template["job_configuration"].keys() <= prefects["job_configuration"].keys()
    variables = template["variables"]
    assert variables["properties"].keys() <= prefects["variables"]["properties"].keys()
    assert not variables["properties"].keys() & (HOSTILE.keys() | {"volumes", "privileged", "namespace"})
    assert variables["additionalProperties"] is False  # the server refuses a run that brings any other
    for name, value in variables["properties"].items():
        assert "{{ " + name + " }}" in json.dumps(template["job_configuration"])
        assert value["description"] and value["type"]


def test_a_process_pool_ignores_what_a_run_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFLOW_SITE_CONFIG", "/etc/fedflow/site.yaml")
    template = read("job-templates/process.json")
    job = asyncio.run(ProcessJobConfiguration.from_template_and_values(template, HOSTILE, client=object()))  # type: ignore[arg-type]
    assert (job.command, job.env, job.working_dir, job.stream_output) == (None, {}, None, True)


def test_containers_find_the_sites_configuration() -> None:
    variable = SiteConfig.environment_variable
    docker = read("job-templates/docker.json")["job_configuration"]
    assert Path(docker["env"][variable]).parent == Path(docker["volumes"][0].split(":")[1])
    pod = read("job-templates/kubernetes.json")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (given,) = container["env"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert given["name"] == variable and str(Path(given["value"]).parent) in mounts
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    state = SiteConfig.load(FILES / "site.example.yaml").state
    assert str(Path(state).parent) in mounts and f"{Path(state).parent}:{Path(state).parent}" in docker["volumes"]


# -- docs/deployment.md ------------------------------------------------------------------------------------------------
PAGE = ROOT / "docs" / "deployment.md"


def commands(program: str) -> list[list[str]]:
    """Every line of the page's code blocks that calls `program`."""
    blocks = re.findall(r"```\w*\n(.*?)```", PAGE.read_text(), flags=re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line.split()[1:] for line in lines if line.split()[:1] == [program]]


def test_the_pages_commands_exist() -> None:
    assert commands("fedflow")
    for words in commands("fedflow"):
        command: click.Command = get_command(app)
        rest = list(words)
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= options


def test_the_pages_files_exist() -> None:
    named = set(re.findall(r"`deployments/([\w./-]+)`", PAGE.read_text()))
    assert {"compose.yaml", "prefect.yaml", "deploy_sites.py"} <= named
    assert all((FILES / name).exists() for name in named)


# -- on a real server --------------------------------------------------------------------------------------------------
def deployed(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    """Deployments of the example federation, by flow and name."""
    flows = {"fedflow-training": ["hospitals"], "fedflow-round": ["hospitals"]}
    flows["fedflow-site"] = Federation.load(FILES / "federation.example.yaml").names
    names = [f"{flow}/{name}" for flow, found in flows.items() for name in found]
    return {name: client.read_deployment_by_name(name) for name in names}


def facts(deployment: DeploymentResponse) -> dict[str, Any]:
    """What a second deploy must not change."""
    same = {"id", "entrypoint", "pull_steps", "parameters", "parameter_openapi_schema", "tags", "work_pool_name"}
    limit = deployment.global_concurrency_limit
    return deployment.model_dump(include=same | {"concurrency_options"}) | {
        "limit": limit.limit if limit else None,
        "schedules": [schedule.slug for schedule in deployment.schedules],
    }


@pytest.mark.timeout(600)
def test_deploying_for_real_twice(prefect_api: PrefectServer) -> None:
    def run(*command: str) -> str:
        env = os.environ | prefect_api.env | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    sites = ("deployments/deploy_sites.py", "deployments/federation.example.yaml")
    deploy_all = ("-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    printed = run(*sites, "--site-type", "process")
    assert "work pool   hospital-a  (process)" in printed and "deployment  fedflow-site/hospital-c" in printed
    run(*deploy_all)
    with SyncPrefectClient(api=prefect_api.url) as client:
        first = deployed(client)
        for name, deployment in first.items():
            assert deployment.pull_steps == []
            flow = load_flow_from_entrypoint(str(deployment.entrypoint))
            assert name == f"{flow.name}/{deployment.name}"
            assert deployment.parameter_openapi_schema == parameter_schema(flow).model_dump_for_openapi()
            assert deployment.enforce_parameter_schema and "fedflow" in deployment.tags
            assert facts(deployment)["limit"] == (1 if name == "fedflow-training/hospitals" else None)
        training = first["fedflow-training/hospitals"]
        assert training.concurrency_options and training.concurrency_options.collision_strategy == "ENQUEUE"
        assert (
            training.work_pool_name == "coordinator" and first["fedflow-site/hospital-b"].work_pool_name == "hospital-b"
        )
        (schedule,) = training.schedules
        assert isinstance(schedule.schedule, CronSchedule) and schedule.schedule.timezone == "Europe/Berlin"
        assert (schedule.schedule.cron, schedule.active, schedule.slug) == ("0 2 * * *", False, "nightly")
        assert not first["fedflow-round/hospitals"].schedules

        # A run brings code along: refused. A run brings what the flow knows: accepted.
        site = first["fedflow-site/hospital-a"]
        call = {"run": "r", "round": 0, "phase": "train", "opening": 1, "attempt": 1, "site": "hospital-a"}
        for name, value in HOSTILE.items():
            with pytest.raises(PrefectHTTPStatusError, match="422"):
                client.create_flow_run_from_deployment(site.id, parameters=call, job_variables={name: value})
        with pytest.raises(PrefectHTTPStatusError, match="409"):
            client.create_flow_run_from_deployment(site.id, parameters=call | {"round": "none"})
        client.delete_flow_run(client.create_flow_run_from_deployment(site.id, parameters=call).id)
        client.delete_flow_run(client.create_flow_run_from_deployment(training.id).id)  # the defaults are enough

        # Again, in both orders: nothing is doubled, nothing is lost.
        client.update_deployment_schedule(training.id, schedule.id, active=True)
        with temporary_settings({PREFECT_API_URL: prefect_api.url}):
            assert deploy_sites.main([str(ROOT / sites[1])]) == 0
        again = deployed(client)
        assert again["fedflow-training/hospitals"].schedules[0].active
        run(*deploy_all)
        for found in (again, deployed(client)):
            for name, deployment in found.items():
                assert facts(deployment) == facts(first[name]), name
        assert client.read_work_pool("hospital-a").type == "process"  # it was made so
        assert client.read_work_pool("hospital-a").base_job_template == read("job-templates/process.json")
