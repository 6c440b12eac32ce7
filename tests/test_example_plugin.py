"""The example plugin as its author's user has it: installed by pip, found by a real process."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from helpers import SCHEDULE, build

from iec_eval.plugins import load_registry
from iec_eval.testing import check_callback

SOURCE = Path(__file__).parents[1] / "plugins" / "iec-eval-example"
CODE = SOURCE / "iec_eval_example" / "__init__.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip installed the plugin."""
    target = tmp_path_factory.mktemp("example")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", str(target)]
    done = subprocess.run([*pip, str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def here(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the plugin visible to this process."""
    monkeypatch.syspath_prepend(site)


def on_path(site: Path) -> str:
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def code_lines(path: Path) -> int:
    lines = (line.strip() for line in path.read_text().splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_it_is_short() -> None:
    assert [path.name for path in CODE.parent.glob("*.py")] == [CODE.name]
    assert code_lines(CODE) <= 60


def test_it_knows_only_the_public_names() -> None:
    files = [CODE, *SOURCE.glob("tests/*.py")]
    ours = {module for file in files for module in imported(file) if module.startswith("iec_eval")}
    assert ours <= {"iec_eval.api", "iec_eval.testing", "iec_eval_example"}
    assert "iec_eval.api" in ours


def imported(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return plain + [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]


def test_its_own_tests_pass(site: Path) -> None:
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SOURCE)]
    done = subprocess.run(
        pytest_command,
        env=environment(PYTHONPATH=on_path(site)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* passed", done.stdout)
    assert "skipped" not in done.stdout


def test_a_real_run_uses_it(
    site: Path, run: Callable[..., Any], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    study, out = write_study(tmp_path), tmp_path / "out"
    overrides = ["-s", "sampler.name=dpm-solver++", "-s", "sampler.steps=7"]
    done = run("launch", study, "-o", out, *overrides, PYTHONPATH=on_path(site))
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    found = {row["name"]: row["cost"] for row in results["variants"]}
    evaluations = {name: cost["evaluations_full"] for name, cost in found.items()}
    assert evaluations == {"full precision": 7, "cached": 3, "cached + IEC": 6}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["study"]["sampler"] == {"name": "dpm-solver++", "steps": 7}
    assert "iec-eval-example" in {item["distribution"] for item in manifest["plugins"]}


def test_it_is_listed(here: None, cli: Callable[..., Any]) -> None:
    found = {item["distribution"]: item for item in json.loads(cli("plugins", "--json").stdout)}
    assert found["iec-eval-example"] == {
        "distribution": "iec-eval-example",
        "version": "0.1.0",
        "hooks": ["iec_eval_samplers"],
        "names": {"sampler": ["dpm-solver++"]},
        "error": None,
    }
    parts = json.loads(cli("models", "--json").stdout)
    (ours,) = [part for part in parts if part["distribution"] == "iec-eval-example"]
    assert (ours["kind"], ours["name"]) == ("sampler", "dpm-solver++")
    assert [option["name"] for option in ours["options"]] == ["steps"]


def test_iec_runs_on_it(here: None) -> None:
    cls = load_registry().get("sampler", "dpm-solver++")
    callback = load_registry().get("callback", "iec")
    sampler = build(cls, {"steps": 5}, SCHEDULE)
    check_callback(callback, {"preset": "paper"}, neutral={"weights": []}, samplers=[sampler])


def test_the_readme_s_commands_hold(here: None, cli: Callable[..., Any]) -> None:
    lines = (SOURCE / "README.md").read_text().splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("    iec-eval ")]
    assert ["plugins"] in commands
    (launch,) = [words for words in commands if words[0] == "launch"]
    shown = cli("show", *launch[1:], "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["rows"][0]["steps"] == 20
    assert cli("plugins").exit_code == 0
