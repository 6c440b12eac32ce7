"""The shape of the code: one direction of imports, short functions, nothing undocumented."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

import iec_eval.api
from iec_eval import hookspecs, plugins
from iec_eval.cli.main import cli
from iec_eval.controls import plan_with_controls
from iec_eval.plugins import BASES, load_registry
from iec_eval.study import load
from iec_eval.study_plans import plan_metrics

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "iec_eval"

# A module imports lower layers, or its own folder's modules in its own layer. First match counts.
LAYERS = {
    "errors": 0,
    "clock": 0,
    "schedule": 0,
    "processes": 0,
    "progress": 0,
    "stopping": 0,
    "embedded": 0,
    "hookspecs": 0,
    "noise": 1,
    "equal_work": 1,
    "intervals": 1,
    "options": 1,
    "storage": 1,
    "claims": 1,
    "images": 1,
    "hub": 1,
    "pretrained": 1,
    "scheduler": 1,
    "study": 2,
    "runs": 2,
    "fingerprints": 2,
    "networks": 2,
    "ranks": 3,
    "denoising": 3,
    "slurm": 3,
    "metrics.features": 4,  # what a feature network is, and the networks
    "conversion": 4,
    "*.base": 5,
    "callbacks.base": 6,  # a callback sees steps of a sampler
    "*.hooks": 8,
    "models": 7,
    "samplers": 7,
    "efficiency": 7,
    "callbacks": 7,
    "metrics": 7,
    "plugins": 9,
    "jackknife": 9,
    "calibration": 10,
    "planning": 10,
    "assembly": 11,
    "study_plans": 12,
    "results": 12,
    "cost": 12,
    "rivals": 13,
    "controls": 14,
    "training": 12,
    "jobs": 12,
    "provenance": 13,
    "scaling": 12,
    "work": 13,
    "generation": 14,
    "report": 13,
    "evaluation": 13,
    "status": 13,
    "influence": 13,
    "comparisons": 14,
    "inspection": 14,
    "pictures": 14,
    "workload": 15,
    "references": 14,
    "analysis": 14,
    "session": 15,
    "stages": 16,
    "workflow": 17,
    "cli": 18,
    "__main__": 19,
    "api": 19,
    "testing": 19,
    "": -1,  # iec_eval itself: the version
}


def layer(module: str) -> int:
    """The layer of a module, named without ``iec_eval.``."""
    patterns = (module, f"*.{module.rpartition('.')[2]}", module.partition(".")[0])
    exact = [LAYERS[module]] if module in LAYERS else []
    return (exact or [LAYERS[pattern] for pattern in patterns if pattern in LAYERS])[0]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name without ``iec_eval.``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: not the blocks under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from runtime_nodes(node)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Whole names that are imported: modules, and names in modules."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports when it runs, anywhere in it."""
    names = {name for name in imported(runtime_nodes(tree)) if f"{name}.".startswith("iec_eval.")}
    short = {name.removeprefix("iec_eval").removeprefix(".") for name in names}
    return {name if name in modules() else name.rpartition(".")[0] for name in short}


# --- imports ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in modules() if name])
def test_imports_point_one_way(module: str) -> None:
    for other in own_imports(modules()[module]):
        same = layer(other) == layer(module)
        family = module.partition(".")[0] == other.partition(".")[0]
        inside = same and (family or layer(module) <= 1)
        assert layer(other) < layer(module) or inside, f"{module} imports {other}"


def test_no_import_goes_in_a_circle() -> None:
    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in visited:
            for other in sorted(own_imports(modules()[module])):
                visit(other, (*above, module))
            visited.add(module)

    visited: set[str] = set()
    for module in modules():
        visit(module, ())


def test_the_layers_name_what_there_is() -> None:
    known = {name for name in LAYERS if not name.startswith("*.")}
    folders = {module.partition(".")[0] for module in modules()}
    assert folders <= known
    unused = known - modules().keys()
    assert not unused


def test_the_command_line_imports_only_click_at_start_up() -> None:
    """Its modules import each other and, of the rest, only what imports nothing but Python."""
    modest = {"", "errors", "processes", "stopping"}
    commands = {module for module in modules() if module.partition(".")[0] == "cli"}
    assert len(commands) > 2
    for module in commands | modest:
        top = imports_at_top(modules()[module])
        heads = {name.partition(".")[0] for name in imported(iter(top.body))}
        allowed = {"click", "iec_eval"} if module in commands else {"iec_eval"}
        assert heads - set(sys.stdlib_module_names) <= allowed, module
        assert own_imports(top) <= modest | (commands if module in commands else set()), module


def imports_at_top(tree: ast.Module) -> ast.Module:
    """The imports that run when a module is imported: those inside functions do not."""
    return ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])


def test_builtin_classes_are_named_in_their_own_family_only() -> None:
    """Registration is the hooks' affair; training and the contract checks use some as a library."""
    registry = load_registry()
    owned = [
        one.cls for kind in BASES for _, one in registry.items(kind) if one.owner == "iec_eval"
    ]
    classes = {f"{cls.__module__}.{cls.__name__}" for cls in owned}
    for module, tree in modules().items():
        family = module.partition(".")[0]
        if family in ("training", "testing"):
            continue
        named = classes & set(imported(runtime_nodes(tree)))
        assert all(name.startswith(f"iec_eval.{family}.") for name in named), (module, named)


def test_third_parties_need_the_public_names_only() -> None:
    for path in sorted((ROOT / "plugins").rglob("*.py")):
        names = imported(ast.walk(ast.parse(path.read_text())))
        ours = {name for name in names if name.startswith("iec_eval.")}
        assert all(name.startswith(("iec_eval.api.", "iec_eval.testing.")) for name in ours), path


# --- public names -----------------------------------------------------------------------------


def test_every_public_name_can_be_imported() -> None:
    names = iec_eval.api.__all__
    assert len(set(names)) == len(names)
    assert all(getattr(iec_eval.api, name) is not None for name in names)
    public = {
        name.rpartition(".")[2] for name in imported(iter(modules()["api"].body)) if "." in name
    }
    assert public - {"annotations"} == set(names)  # nothing is there by accident


def test_every_hook_is_implemented_or_tested() -> None:
    hooks = {name for name in vars(hookspecs) if name.startswith("iec_eval_")}
    assert {hook for hook, *_ in BASES.values()} <= hooks
    manager, _ = plugins.plugin_manager()
    implemented = {hook for hook in hooks if getattr(manager.hook, hook).get_hookimpls()}
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_plugins.py"))
    assert implemented | {hook for hook in hooks if f"def {hook}(" in tests} == hooks
    assert all(getattr(hookspecs, hook).__doc__ for hook in hooks)


def test_every_option_says_what_it_is() -> None:
    registry = load_registry()
    silent = [
        f"{kind} {name}: {option}"
        for kind in BASES
        for name, one in registry.items(kind)
        for option, field in one.cls.Options.model_fields.items()
        if not (field.description or "").strip()
    ]
    assert silent == []


# --- form -------------------------------------------------------------------------------------

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Functions and classes of a module, and methods of its classes, with their names."""
    for node in tree.body:
        if isinstance(node, Definition):
            yield node.name, node
            inner = node.body if isinstance(node, ast.ClassDef) else []
            yield from ((f"{node.name}.{n.name}", n) for n in inner if isinstance(n, Definition))


def test_everything_public_has_a_docstring() -> None:
    missing = [
        f"{module or 'iec_eval'}: {name}"
        for module, tree in modules().items()
        for name, node in definitions(tree)
        if "." not in name and not name.startswith("_") and not ast.get_docstring(node)
        if not module.endswith(".hooks")  # documented where they are specified
    ]
    assert missing == []
    assert [m for m, tree in modules().items() if not ast.get_docstring(tree)] == []


def test_what_a_plugin_implements_has_a_docstring() -> None:
    missing = [
        f"{module}: {name}"
        for module in modules()
        if module.endswith(".base")
        for name, node in definitions(modules()[module])
        if "abstractmethod" in [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
        and not ast.get_docstring(node)
    ]
    assert missing == []


def test_functions_are_short() -> None:
    lengths = {
        f"{module}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    longest = max(lengths, key=lambda name: lengths[name])
    assert lengths[longest] <= 60, f"{longest} has {lengths[longest]} lines"
    assert statistics.median(lengths.values()) <= 10


def test_registration_is_short() -> None:
    for path in PACKAGE.glob("*/hooks.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= 15, path


# --- what comes with it -----------------------------------------------------------------------


def studies() -> list[Path]:
    own = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "embedded").glob("*.yaml")]
    return sorted([*own, *(PACKAGE / "studies").glob("*.yaml")])


def test_there_are_studies() -> None:
    assert [path.stem for path in studies()].count("quickstart") == 2


@pytest.mark.parametrize("path", studies(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_study_assembles(path: Path) -> None:
    registry = load_registry()
    study = load(str(path))
    plans = plan_with_controls(study, registry)
    assert plan_metrics(study, registry, plans)
    assert len({plan.fingerprint for plan in plans}) == len(plans)


@pytest.mark.parametrize("path", (ROOT / "configs").glob("*.yaml"), ids=lambda path: path.stem)
def test_configs_are_the_packaged_studies(path: Path) -> None:
    assert path.read_bytes() == (PACKAGE / "studies" / path.name).read_bytes()
    assert load(path.stem) == load(str(path))


def test_the_wheel_holds_what_is_needed(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(set(names)) == len(names)
    wanted = {str(path.relative_to(ROOT)) for path in package_files()}
    assert wanted <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"iec_eval"}


def package_files() -> list[Path]:
    """Files that the package needs at run time."""
    suffixes = {".py", ".typed", ".yaml", ".json", ".safetensors", ".html", ".css", ".js"}
    return [path for path in PACKAGE.rglob("*") if path.suffix in suffixes]


def readme_commands() -> list[str]:
    """Lines of the READMEs that call the program, whatever surrounds them."""
    paths = [ROOT / "README.md", *(ROOT / "plugins").glob("*/README.md")]
    lines = [line.strip().removeprefix("$ ") for p in paths for line in p.read_text().splitlines()]
    return sorted({line.split(" #")[0] for line in lines if line.startswith("iec-eval ")})


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_commands(command: str) -> None:
    name = command.split()[1]
    shown = CliRunner().invoke(cli, ["--help"] if name.startswith("-") else [name, "--help"])
    assert shown.exit_code == 0


def tracked_files() -> list[Path]:
    """What a release is made of: git's files, or all there are outside a checkout."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    done = subprocess.run([*listing, "--exclude-standard"], capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [ROOT / name for name in done.stdout.split("\0") if name]
    hidden = re.compile(r"(^|/)\.|__pycache__")
    return [p for p in ROOT.rglob("*") if not hidden.search(str(p.relative_to(ROOT)))]


def test_no_file_knows_where_it_was_written() -> None:
    places = re.compile(rb"(?<![\w.])/" + rb"(work|opt|root|home)/\w")
    text = [path for path in tracked_files() if path.is_file() and path.suffix != ".safetensors"]
    assert len(text) > 50
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in text
        for match in places.finditer(path.read_bytes())
    ]
    assert found == []
