"""The README is a contract: what it shows is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from iec_eval.cli.main import cli
from iec_eval.options import validated
from iec_eval.planning import build
from iec_eval.plugins import load_registry
from iec_eval.study import Study, load
from iec_eval.study_plans import plan_study
from iec_eval.testing import check_callback

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines() + README.read_text().splitlines()
    found = {line.strip().split("#")[0].strip() for line in lines}
    return sorted(line for line in found if line.startswith("iec-eval "))


def test_the_readme_shows_commands():
    assert "iec-eval launch quickstart" in commands()
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command):
    words = shlex.split(command)[1:]
    found = cli.commands[words[0]]
    found.make_context(words[0], words[1:])


def test_the_study_is_a_whole_one(tmp_path):
    (text,) = blocks("yaml")
    path = tmp_path / "study.yaml"
    path.write_text(text)
    names = [row.name for row in load(str(path)).experiments()]
    assert names[-1] == "DeepCache N=10 + IEC"
    assert validated(Study, yaml.safe_load(text), "README").images.count == 5000


def test_the_variants_fit_into_the_study():
    """Rows of efficiency methods, shown on their own, as rows of the whole study."""
    (text,), (rows,) = blocks("yaml"), blocks("yml")
    study = {**yaml.safe_load(text), "variants": yaml.safe_load(rows)}
    plans = plan_study(validated(Study, study, "README"), load_registry())
    parts = {plan.experiment.name: [part.name for part in plan.parts()] for plan in plans}
    assert parts["W4A8"] == ["timestep-quantizer", "reconstruction"]
    assert parts["CacheQuant"][-1] == "quantization-correction"
    assert parts["CacheQuant W4A8"][-1] == "reconstruction"


def test_the_plugin_works_and_keeps_the_contract():
    (text,) = [block for block in blocks("python") if "hookimpl" in block]
    assert len([line for line in text.splitlines() if line.strip()]) <= 22
    scope: dict[str, object] = {"__name__": "my_plugin"}
    exec(compile(text, "README plugin", "exec"), scope)
    (callback,) = scope["iec_eval_callbacks"]()  # type: ignore[operator]
    assert callback.name == "centred-noise"
    check_callback(callback, {"strength": 0.5}, neutral={"strength": 0.0})


def test_the_metrics_are_all_there():
    """In the table, and with options that they have where they are shown."""
    registry = load_registry()
    section = README.read_text().partition("## Metrics")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == sorted(
        registry.names("metric")
    )
    (text,) = blocks("yaml metrics")
    for part in yaml.safe_load(text)["metrics"]:
        build(registry, "metric", part, "README")


def test_every_part_the_readme_names_is_registered():
    registry = load_registry()
    assert "unet" in registry.names("model")
    assert {"deepcache"} <= set(registry.names("efficiency method"))
