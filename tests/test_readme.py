"""The README's page is followed top to bottom, as a new user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedflow.recipe import Recipe
from tests.shell import run_shell

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

ELSEWHERE = {  # what other tests run, or runs these tests
    "make demo": "continuous integration",
    "make test": "continuous integration",
    "pip install 'fedflow[plot,examples]'": "tests/test_wheel.py",
    "fedflow ui digits-2": "tests/prefect/test_browser.py",
    "export PREFECT_API_URL=https://fedflow.example.org/api": "tests/test_deployments.py",
    "fedflow deploy federation.yaml --recipe recipe.yaml": "tests/test_deployments.py",
    "fedflow run recipe.yaml --env prod --federation federation.yaml": "tests/test_deployments.py",
}


def blocks(language: str) -> list[str]:
    """The README's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line[2:].split(" #")[0].rstrip() for block in blocks("console") for line in block.splitlines()]
    starts = [line[:2] for block in blocks("console") for line in block.splitlines()]
    return [line for line, start in zip(lines, starts, strict=True) if start == "$ "]


def shorter(command: str) -> str:
    """Twelve rounds show no more than two do."""
    return command.replace("--rounds 12", "--rounds 2")


FEWER = [  # nor do four sites
    "sed -i 's/^rounds: 10$/rounds: 1/; s/^quorum: 3 /quorum: 2 /' recipe.yaml",
    "sed -i 's/, site-3, site-4//' federation.yaml",
]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every command of the README was run, in order."""
    folder = tmp_path_factory.mktemp("readme")
    shell = []
    for command in commands():
        if command not in ELSEWHERE:
            shell += [f"echo '$ {command}'", shorter(command)]
        if command.startswith("fedflow init"):
            shell += FEWER
    (folder / "output").write_text(run_shell(folder, shell))
    return folder


def test_every_command_succeeds(followed: Path) -> None:
    output = (followed / "output").read_text()
    last = [c for c in commands() if c not in ELSEWHERE][-1]
    assert f"$ {last}\n" in output, output
    assert "digits-2 finished: 2 rounds" in output, output


def test_what_is_shown_is_what_is_printed(followed: Path) -> None:
    """Lines below a command are its output; `ls` prints a name a line here, and the folder has runs later."""
    shown = next(block for block in blocks("console") if "$ ls\n" in block).partition("$ ls\n")[2].split()
    printed = (followed / "output").read_text().partition("$ ls\n")[2].partition("$ ")[0].split()
    assert shown == printed


def test_the_files_that_the_commands_name_are_there(followed: Path) -> None:
    project = followed / "hospital"
    assert (project / "model.safetensors").stat().st_size > 0
    assert (project / "fedflow-runs" / "plots" / "digits-1.png").stat().st_size > 0
    digests = re.findall(r"digits-\d finished: 1 round.*?model +(blake3:\w+)", (followed / "output").read_text(), re.S)
    assert len(digests) == 3 and len(set(digests)) == 1  # simulated, on a Prefect server, and resumed there


def test_the_recipe_is_the_template_s() -> None:
    (text,) = blocks("yaml")
    path = ROOT / "fedflow" / "template" / "recipe.yaml"
    assert Recipe.load(yaml.safe_load(text)) == Recipe.load(path)


def test_the_python_examples_run(followed: Path) -> None:
    code = "\n".join(blocks("python")).replace('"recipe.yaml"', '"../hospital/recipe.yaml"')
    (followed / "python").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=followed / "python",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(followed / "hospital")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'accuracy'" in done.stdout
