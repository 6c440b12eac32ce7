"""Plugins: everybody comes in by one door, and nobody's failure is anybody else's."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from iec_eval import plugins
from iec_eval.errors import PluginError, UnknownName
from iec_eval.plugins import BUILTINS, RESTRICT, load_registry, plugin_manager
from iec_eval.stopping import Terminated, ending_when_asked

Cli = Callable[..., Result]
Install = Callable[..., str]
Write = Callable[..., Path]

SAMPLER = """
from iec_eval.api import BaseOptions, Sampler, State, hookimpl

class Walk(Sampler):
    name = "walk"

    def __init__(self, options, schedule):
        super().__init__(options, schedule)
        self.timesteps = (9, 5, 0)

    def step(self, state, index, prediction, draw):
        return State(state.sample - 0.1 * prediction)
"""
GOOD = f"{SAMPLER}\n@hookimpl\ndef iec_eval_samplers():\n    return [Walk]\n"


def returning(value: str) -> str:
    return f"{SAMPLER}\n@hookimpl\ndef iec_eval_samplers():\n    return {value}\n"


BROKEN = {
    "needs-more": (
        "import a_package_nobody_has",
        "ModuleNotFoundError: No module named 'a_package_nobody_has'",
    ),
    "quits": ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
    "unfinished": ("def", "SyntaxError: "),
    "misspelled": (
        f"{SAMPLER}\n@hookimpl\ndef iec_eval_sampler():\n    return [Walk]\n",
        "PluginValidationError: unknown hook 'iec_eval_sampler'",
    ),
    "greedy": (
        f"{SAMPLER}\n@hookimpl\ndef iec_eval_samplers(config):\n    return [Walk]\n",
        "Argument(s) {'config'} are declared in the hookimpl but can not be found",
    ),
    "raises": (returning("[][0]"), "IndexError: list index out of range"),
    "quits-late": (returning("exit('no licence')"), "SystemExit: no licence"),
    "no-list": (
        returning("Walk"),
        "PluginError: iec_eval_samplers must return a list of classes, got <class",
    ),
    "wrong-class": (
        returning("[Walk, dict]"),
        "PluginError: iec_eval_samplers returned <class 'dict'>, wanted a subclass of Sampler",
    ),
    "no-class": (returning("['walk']"), "returned 'walk', wanted a subclass of Sampler"),
    "nameless": (returning("[Walk]").replace('name = "walk"', ""), "PluginError: Walk has no name"),
    "no-options": (
        returning("[Walk]").replace('name = "walk"', 'name, Options = "walk", 3'),
        "PluginError: Walk.Options is not an Options class",
    ),
    "foreign-options": (
        "from pydantic import BaseModel\n\nclass Plain(BaseModel): ...\n"
        + returning("[Walk]").replace('name = "walk"', 'name, Options = "walk", Plain'),
        "PluginError: Walk.Options is not an Options class",
    ),
    "stepless": (
        returning("[Walk]").replace("def step", "def stop"),
        "PluginError: Walk does not define step",
    ),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(name, *codes)`` installs a distribution with one plugin module for each code."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def make(name: str, *codes: str) -> str:
        about = site / f"{name.replace('-', '_')}-1.2.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = []
        for code in codes:
            module = f"plugin_{next(NUMBERS)}"  # a name that no other test has imported
            (site / f"{module}.py").write_text(code)
            lines.append(f"{name}-{module} = {module}")
        (about / "entry_points.txt").write_text("\n".join(["[iec_eval]", *lines]))
        return name

    return make


NUMBERS = itertools.count()


def listed(cli: Cli) -> dict[str, dict[str, Any]]:
    """What ``iec-eval plugins --json`` says, by distribution."""
    found = json.loads(cli("plugins", "--json").stdout)
    assert all(item.keys() == KEYS for item in found)
    assert len({item["distribution"] for item in found}) == len(found)
    return {item["distribution"]: item for item in found}


KEYS = {"distribution", "version", "hooks", "names", "error"}


# --- the one door -----------------------------------------------------------------------------


def test_without_the_hook_modules_there_are_no_builtins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESTRICT, "")
    monkeypatch.setattr(plugins, "BUILTINS", ())
    registry = load_registry()
    assert [registry.names(kind) for kind in plugins.BASES] == [[]] * len(plugins.BASES)


@pytest.mark.parametrize("module", BUILTINS)
def test_each_hook_module_brings_its_own_family(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setenv(RESTRICT, "")
    whole = load_registry()
    monkeypatch.setattr(plugins, "BUILTINS", tuple(name for name in BUILTINS if name != module))
    rest = load_registry()
    lost = [kind for kind in plugins.BASES if not rest.names(kind)]
    assert len(lost) == 1
    kept = set(plugins.BASES) - set(lost)
    assert all(whole.names(kind) == rest.names(kind) for kind in kept)


def test_every_manager_is_a_fresh_one(install: Install) -> None:
    first, _ = plugin_manager()
    install("late", GOOD)
    second, found = plugin_manager()
    assert first is not second
    assert "late" in {item.distribution for item in found}
    assert not any(name.startswith("late:") for name, _ in first.list_name_plugin())
    second.unregister(name=second.list_name_plugin()[0][0])
    assert load_registry().names("model")


def test_a_plugin_is_listed_with_what_it_brings(cli: Cli, install: Install) -> None:
    install("walker", GOOD)
    found = listed(cli)
    assert found["walker"] == {
        "distribution": "walker",
        "version": "1.2",
        "hooks": ["iec_eval_samplers"],
        "names": {"sampler": ["walk"]},
        "error": None,
    }
    assert "ddim" in found["iec_eval"]["names"]["sampler"]
    assert set(found["iec_eval"]["hooks"]) == {hook for hook, *_ in plugins.BASES.values()}
    text = cli("plugins").stdout
    assert "walker 1.2\n  sampler: walk\n" in text


def test_a_distribution_may_bring_several_modules(cli: Cli, install: Install) -> None:
    events = "from iec_eval.api import hookimpl\n\n@hookimpl\ndef iec_eval_run_finished(): ...\n"
    install("pair", GOOD, events)
    found = listed(cli)["pair"]
    assert sorted(found["hooks"]) == ["iec_eval_run_finished", "iec_eval_samplers"]
    assert found["names"] == {"sampler": ["walk"]}
    assert load_registry().get("sampler", "walk").name == "walk"  # registered once


# --- broken plugins ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_set_aside_with_its_error(cli: Cli, install: Install, name: str) -> None:
    code, error = BROKEN[name]
    before = load_registry()
    install(name, code)
    install("walker", GOOD)
    found = listed(cli)
    assert error in found[name]["error"]
    assert "\n" not in found[name]["error"]
    assert (found[name]["names"], found[name]["hooks"]) == ({}, [])
    assert found["walker"]["error"] is None
    assert f"{name} 1.2: BROKEN, not loaded: {found[name]['error']}" in cli("plugins").stdout
    after = load_registry()
    assert after.names("sampler") == sorted([*before.names("sampler"), "walk"])
    assert not any(one.startswith(f"{name}:") for one, _ in after.manager.list_name_plugin())


def test_two_functions_may_serve_one_hook(install: Install) -> None:
    second = (
        "\nclass Run(Walk):\n    name = 'run'\n"
        "\n@hookimpl(specname='iec_eval_samplers')\ndef more_samplers():\n    return [Run]\n"
    )
    install("both", GOOD + second)
    assert {"walk", "run"} <= set(load_registry().names("sampler"))


def test_half_a_distribution_is_not_loaded(cli: Cli, install: Install) -> None:
    install("half", GOOD, BROKEN["needs-more"][0])
    found = listed(cli)["half"]
    assert found["error"].startswith("ModuleNotFoundError")
    assert found["names"] == {}
    assert "walk" not in load_registry().names("sampler")


def test_half_a_module_is_not_loaded(install: Install) -> None:
    metrics = "\n@hookimpl\ndef iec_eval_metrics():\n    raise RuntimeError\n"
    install("half", GOOD + metrics)
    assert "walk" not in load_registry().names("sampler")


def test_an_interruption_is_not_a_broken_plugin(install: Install) -> None:
    install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugin_manager()


def test_a_signal_while_a_plugin_is_imported_ends_the_program(install: Install) -> None:
    """As at any other moment: SLURM's, before it preempts, or when a time limit is near."""
    install("slow", "import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n")
    with ending_when_asked(), pytest.raises(Terminated):
        plugin_manager()


def test_runs_go_on_and_name_the_broken_once(
    cli: Cli, install: Install, write_study: Write, tmp_path: Path
) -> None:
    study, out = write_study(tmp_path, images={"count": 4}), tmp_path / "out"
    before = json.loads(cli("show", study, "-o", out, "--json").stdout)
    for name, (code, _) in BROKEN.items():
        install(name, code)
    shown = cli("show", study, "-o", out, "--json")
    assert json.loads(shown.stdout) == before  # fingerprints and all
    launched = cli("launch", study, "-o", out)
    assert launched.exit_code == 0
    for name in BROKEN:
        told = f"iec-eval: plugin {name} is broken and was not loaded; see iec-eval plugins"
        assert shown.stderr.splitlines().count(told) == 1
        assert launched.stderr.splitlines().count(told) == 1
    manifest = json.loads((out / "manifest.json").read_text())
    errors = {item["distribution"]: item["error"] for item in manifest["plugins"]}
    assert all(errors[name] for name in BROKEN)
    assert errors["iec_eval"] is None


def test_an_unknown_name_mentions_the_broken(
    cli: Cli, install: Install, write_study: Write, tmp_path: Path
) -> None:
    install("quits", BROKEN["quits"][0])
    install("walker", GOOD)
    study = write_study(tmp_path, sampler={"name": "wakl"})
    message = cli("show", study).stderr.splitlines()[-1]
    assert "unknown sampler 'wakl'; did you mean 'walk'? (available: ddim, " in message
    assert "walker 1.2" in message
    assert message.endswith("broken: quits, see iec-eval plugins)")


# --- two with one name ------------------------------------------------------------------------


def test_one_name_of_two_owners_is_refused_where_it_is_named(
    cli: Cli, install: Install, write_study: Write, tmp_path: Path
) -> None:
    install("first", GOOD)
    install("second", GOOD)
    assert cli("show", write_study(tmp_path)).exit_code == 0
    refused = cli("show", write_study(tmp_path, sampler={"name": "walk"}))
    assert refused.exit_code == 2
    assert refused.stderr == (
        "iec-eval: sampler 'walk' is registered by first and second; uninstall one of them, or "
        "choose the plugins to load with IEC_EVAL_PLUGINS\n"
    )
    found = listed(cli)
    assert all(found[name]["names"] == {"sampler": ["walk"]} for name in ("first", "second"))


def test_nobody_takes_the_place_of_a_builtin(install: Install) -> None:
    install("thief", GOOD.replace('"walk"', '"ddim"'))
    with pytest.raises(PluginError, match="'ddim' is registered by iec_eval and thief"):
        load_registry().get("sampler", "ddim")


def test_installing_changes_no_run_that_does_not_name_it(
    cli: Cli, install: Install, write_study: Write, tmp_path: Path
) -> None:
    study = write_study(tmp_path)
    before = cli("show", study, "--json").stdout
    install("walker", GOOD)
    assert cli("show", study, "--json").stdout == before
    assert "walk" in load_registry().names("sampler")


# --- choosing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "loaded"),
    [
        ("first", {"first"}),
        ("first, second", {"first", "second"}),
        ("second,,", {"second"}),
        ("", set()),
    ],
)
def test_the_environment_chooses(
    cli: Cli,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    loaded: set[str],
) -> None:
    install("first", GOOD)
    install("second", GOOD.replace('"walk"', '"run"'))
    monkeypatch.setenv(RESTRICT, wanted)
    assert listed(cli).keys() == {"iec_eval", *loaded}


def test_an_entry_point_may_be_chosen_by_its_own_name(
    cli: Cli, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("pair", GOOD, GOOD.replace('"walk"', '"run"'))
    found = metadata.entry_points(group="iec_eval")
    entry = next(e.name for e in found if e.name.startswith("pair-"))
    monkeypatch.setenv(RESTRICT, entry)
    assert len(listed(cli)["pair"]["names"]["sampler"]) == 1


def test_a_choice_of_what_is_not_installed_is_told(
    cli: Cli, install: Install, write_study: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("walker", GOOD)
    monkeypatch.setenv(RESTRICT, "wakler")
    assert listed(cli)["wakler"]["error"] == (
        "IEC_EVAL_PLUGINS names it, and no plugin that is installed is called that"
    )
    refused = cli("show", write_study(tmp_path, sampler={"name": "walk"}))
    assert "unknown sampler 'walk'" in refused.stderr
    assert "broken: wakler, see iec-eval plugins" in refused.stderr


def test_what_is_not_chosen_is_not_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("quits", "import sys\nsys.modules['it_ran'] = 1")
    monkeypatch.setenv(RESTRICT, "")
    load_registry()
    assert "it_ran" not in sys.modules


def test_a_choice_settles_a_double_name(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("first", GOOD)
    install("second", GOOD)
    monkeypatch.setenv(RESTRICT, "second")
    assert load_registry().get("sampler", "walk").name == "walk"


def test_names_are_of_one_kind(install: Install) -> None:
    install("walker", GOOD)
    with pytest.raises(UnknownName, match="unknown metric 'walk'"):
        load_registry().get("metric", "walk")


# --- the event --------------------------------------------------------------------------------

NOTES = """
import json, os
from pathlib import Path
from iec_eval.api import hookimpl

@hookimpl
def iec_eval_run_finished(result):
    stored = json.loads(Path(os.environ["RUN_OUT"], "results.json").read_text())
    with open(os.environ["RUN_NOTES"], "a") as notes:
        print(json.dumps([result, stored]), file=notes)
    result.clear()
"""


def raising(statement: str) -> str:
    head = "from iec_eval.api import hookimpl\n\n@hookimpl\ndef iec_eval_run_finished():\n"
    return f"{head}    {statement}\n"


def test_the_end_of_a_run_is_told_once_after_the_result_is_on_disk(
    cli: Cli,
    install: Install,
    write_study: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, notes = tmp_path / "out", tmp_path / "notes"
    monkeypatch.setenv("RUN_OUT", str(out))
    monkeypatch.setenv("RUN_NOTES", str(notes))
    install("notes", NOTES)
    install("grumble", raising("raise OSError('no network')"))
    install("leaves", raising("raise SystemExit('bye')"))
    study = write_study(tmp_path, images={"count": 4})
    ended = cli("launch", study, "-o", out)
    assert ended.exit_code == 0
    assert "full precision" in ended.stdout
    assert "iec-eval: grumble:" in ended.stderr
    assert "run_finished failed: no network" in ended.stderr
    assert "run_finished failed: bye" in ended.stderr
    (line,) = notes.read_text().splitlines()
    told, stored = json.loads(line)
    assert told == stored == json.loads((out / "results.json").read_text())
    assert [row["status"] for row in told["variants"]] == ["done"] * 3
    assert listed(cli)["notes"]["hooks"] == ["iec_eval_run_finished"]
