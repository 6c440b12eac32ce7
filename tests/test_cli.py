"""The command line: what it prints, what it writes, and what it says to a mistake."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import VARIANTS, Toy, environment
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iec_eval
from iec_eval.cli.main import cli as program
from iec_eval.errors import ConfigError
from iec_eval.images import ImagePreparation, open_images
from iec_eval.metrics.features import ClassifierFeatures
from iec_eval.metrics.statistics import ReferenceStatistics
from iec_eval.models.unet import FolderModel, UNet, UNetOptions
from iec_eval.pictures import _refuse_others
from iec_eval.plugins import BASES
from iec_eval.report.wording import quantity
from iec_eval.runs import VariantFolder

Cli = Callable[..., Result]
Write = Callable[..., Path]

# --- help -------------------------------------------------------------------------------------

ALL_HELP = """
import sys
from iec_eval.cli.main import cli
for words in [[], *([name] for name in cli.commands)]:
    try:
        cli([*words, "--help"], prog_name="iec-eval")
    except SystemExit as ended:
        assert not ended.code
heavy = {"torch", "lightning", "diffusers", "pydantic", "numpy", "matplotlib", "torchvision"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def real(*words: str) -> tuple[str, float]:
    """Standard output of a light real process, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.stdout, spent


@pytest.mark.parametrize("name", [None, *program.commands])
def test_every_command_has_help(cli: Cli, name: str | None) -> None:
    shown = cli(*([name] if name else []), "--help")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("Usage: ")
    command = program.commands[name] if name else program
    assert command.help
    assert all(getattr(p, "help", "") for p in command.params if p.param_type_name == "option")


def test_help_imports_nothing_heavy() -> None:
    text, _ = real(sys.executable, "-c", ALL_HELP)
    assert text.count("Usage: iec-eval") == 1 + len(program.commands)


def test_help_is_instant() -> None:
    # CPU time: how long the machine keeps us waiting is not ours to promise
    spent = [real(sys.executable, "-m", "iec_eval", "--help")[1] for _ in range(3)]
    assert min(spent) < 0.5


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("table", "-h")])
def test_the_module_is_the_same_program(words: tuple[str, ...]) -> None:
    script = Path(sys.executable).with_name("iec-eval")
    module, _ = real(sys.executable, "-m", "iec_eval", *words)
    assert module == real(str(script), *words)[0]
    assert iec_eval.__version__ in module or "Usage: iec-eval" in module


# --- lists ------------------------------------------------------------------------------------


def test_models_lists_every_part_with_its_options(cli: Cli) -> None:
    parts = json.loads(cli("models", "--json").stdout)
    kinds = {part["kind"] for part in parts}
    assert kinds == set(BASES)
    found = {(part["kind"], part["name"]): part for part in parts}
    iec = {option["name"]: option for option in found["callback", "iec"]["options"]}
    assert iec["weights"]["default"] == [0.5]
    assert iec["tolerance"]["default"] == 1e-5  # as the preset that is taken, the paper's, has it
    interval = found["efficiency method", "deepcache"]["options"][0]
    assert interval == {
        "name": "interval",
        "required": True,
        "default": None,
        "description": "every N-th step is full, starting with step 0; on average, where the "
        "schedule is not uniform",
    }
    text = cli("models").stdout
    for part in parts:
        assert f"{part['kind']} {part['name']} ({part['distribution']}): {part['summary']}" in text
        assert part["summary"] or part["distribution"] != "iec_eval"  # others' need none


def test_plugins_lists_the_builtins(cli: Cli) -> None:
    found = {item["distribution"]: item for item in json.loads(cli("plugins", "--json").stdout)}
    assert found["iec_eval"]["version"] == iec_eval.__version__
    assert "unet" in found["iec_eval"]["names"]["model"]
    assert f"iec_eval {iec_eval.__version__}\n  model: " in cli("plugins").stdout


# --- show -------------------------------------------------------------------------------------


def rows(cli: Cli, study: Path, *more: Any) -> dict[str, dict[str, Any]]:
    shown = cli("show", study, *more, "--json")
    assert shown.exit_code == 0, shown.stderr
    return {row["name"]: row for row in json.loads(shown.stdout)["rows"]}


def test_show_reads_no_weights(
    cli: Cli, write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("iec_eval.networks.load_weights", refuse)
    monkeypatch.setattr("iec_eval.metrics.features.load_weights", refuse)
    monkeypatch.setattr(FolderModel, "load", refuse)
    monkeypatch.setattr(ClassifierFeatures, "load", refuse)
    shown = cli("show", write_study(tmp_path), "-o", tmp_path / "out")
    assert shown.exit_code == 0
    assert not (tmp_path / "out").exists()


def test_show_prints_the_study_and_a_line_for_each_row(
    cli: Cli, write_study: Write, tmp_path: Path
) -> None:
    shown = cli("show", write_study(tmp_path)).stdout.splitlines()
    assert shown[0] == "study: toy"
    cost = rows(cli, write_study(tmp_path))["cached + IEC"]["macs_per_image"] / 1e6
    assert shown[-2] == (
        f"cached + IEC: 5 steps, 4 full + 3 cached evaluations, {cost:.3g} MMAC an image; "
        "10 of 10 images missing, 640 B on disk, 0 seconds"
    )
    total = "In all 3 rows, 1.92 kB on disk, 0 seconds of one process: estimated"
    assert shown[-1].startswith(total)


def test_show_estimates_hours_from_the_work(cli: Cli, write_study: Write, tmp_path: Path) -> None:
    """Two operations for each multiply-accumulate, of all images."""
    study = write_study(tmp_path, images={"count": 1_000_000})
    for row in rows(cli, study, "--tflops", "0.001").values():
        wanted = 2 * row["macs_per_image"] * 1_000_000 / 1e9 / 3600
        assert row["hours"] == pytest.approx(wanted)
    lines = cli("show", study, "--tflops", "0.001").stdout.splitlines()
    hours = sum(row["hours"] for row in rows(cli, study, "--tflops", "0.001").values())
    assert f"{hours:.1f} hours of one process: estimated" in lines[-1]
    assert "at 0.001 TFLOP/s" in lines[-1]


def test_show_does_not_take_a_cpu_for_a_gpu(
    cli: Cli, write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path)
    for accelerator, there, tflops in (
        ("cpu", True, 0.1), ("gpu", False, 15), ("auto", True, 15), ("auto", False, 0.1),
    ):  # fmt: skip
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
        asked = ("show", study, "-s", f"execution.accelerator={accelerator}")
        assert json.loads(cli(*asked, "--json").stdout)["tflops"] == tflops
        assert f"at {tflops} TFLOP/s" in cli(*asked).stdout


def test_show_lists_what_is_missing_and_the_other_verbs_refuse(
    cli: Cli, write_study: Write, tmp_path: Path
) -> None:
    metrics = [{"name": "fid", "weights": "/nowhere/inception", "reference": "nowhere.safetensors"}]
    study = write_study(tmp_path, model={"name": "ddpm-cifar10", "path": "gone"}, metrics=metrics)
    found = json.loads(cli("show", study, "--json").stdout)
    assert len(found["lacking"]) == 3
    assert found["lacking"][0].startswith("model: gone/unet/config.json not found")
    assert found["lacking"][1].startswith("features inception: no weights at /nowhere/inception")
    assert found["lacking"][2].startswith("reference 'nowhere.safetensors': wanted a file")
    assert "Before it can run:\n- model: gone/" in cli("show", study).stdout
    for verb in ("launch", "generate", "calibrate", "evaluate"):
        assert refusal(cli(verb, study, "-o", tmp_path / "out")).startswith("model: gone/unet")
    assert not (tmp_path / "out").exists()


def test_show_prints_what_is_doubtful(cli: Cli, write_study: Write, tmp_path: Path) -> None:
    path = write_study(tmp_path, doubtful={"cached": "Two values are published."})
    assert "cached: Two values are published." in cli("show", path).stdout
    shown = json.loads(cli("show", path, "--json").stdout)
    assert shown["study"]["doubtful"] == {"cached": "Two values are published."}


@pytest.mark.parametrize(
    ("where", "extra"),
    [
        # the paper's table 5, overhead in percent of T = 100
        ("all", 100),
        ({"ends": "1/4"}, 50),
        ({"ends": "1/8"}, 25),
        ({"ends": "1/10"}, 20),
        ({"ends": "1/20"}, 10),
        ("first", 1),
        ([0, 50, 99], 3),
    ],
)
def test_show_counts_the_evaluations_of_table_5(
    cli: Cli, write_study: Write, tmp_path: Path, where: Any, extra: int
) -> None:
    variants = [
        {"name": "full"},
        {"name": "iec", "callbacks": [{"name": "iec", "where": where}]},
    ]
    sampler = {"name": "ddim", "steps": 100}
    found = rows(cli, write_study(tmp_path, variants=variants, sampler=sampler))
    counts = {name: (r["evaluations_full"], r["evaluations_cached"]) for name, r in found.items()}
    assert counts == {"full": (100, 0), "iec": (100 + extra, 0)}
    relative = found["iec"]["macs_per_image"] / found["full"]["macs_per_image"]
    assert relative == pytest.approx(1 + extra / 100)


def test_show_counts_cached_evaluations_and_controls(
    cli: Cli, write_study: Write, tmp_path: Path
) -> None:
    found = rows(
        cli,
        write_study(tmp_path, controls=["full-precision+iec"]),
        *("-s", "sampler.steps=100", "-s", "variants.1.efficiency.0.interval=5"),
    )
    counts = {name: (r["evaluations_full"], r["evaluations_cached"]) for name, r in found.items()}
    assert counts == {
        "full precision + IEC": (200, 0),
        "full precision": (100, 0),
        "cached": (20, 80),
        "cached + IEC": (40, 80),
    }
    assert [name for name, row in found.items() if row["control"]] == ["full precision + IEC"]


def test_show_counts_multiply_accumulates_as_torch_does(
    cli: Cli, write_study: Write, toy: Toy, tmp_path: Path
) -> None:
    network = UNet(UNetOptions(path=str(toy.folder))).load()
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with torch.inference_mode(), plain, FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 1, 8, 8), torch.tensor([5]), class_labels=torch.tensor([0]))
    found = rows(cli, write_study(tmp_path))
    assert found["full precision"]["macs_per_image"] == 5 * counter.get_total_flops() // 2
    assert 0 < found["cached"]["macs_per_image"] < found["full precision"]["macs_per_image"]
    stored = sum(tensor.numel() for tensor in load_file(toy.weights).values())
    assert found["full precision"]["weight_bytes"] == 4 * stored


def test_show_tells_what_is_missing(
    cli: Cli, write_study: Write, tmp_path: Path, finished: Path
) -> None:
    study = write_study(tmp_path)
    assert {row["missing"] for row in rows(cli, study, "-o", finished).values()} == {0}
    more = rows(cli, study, "-o", finished, "-s", "images.count=13")
    assert {row["missing"] for row in more.values()} == {3}
    assert {row["missing"] for row in rows(cli, study, "-o", tmp_path / "new").values()} == {10}


def test_overrides_are_values_of_yaml(cli: Cli, write_study: Write, tmp_path: Path) -> None:
    overrides = ("-s", "images.count=3", "-s", "sampler={name: ddim, steps: 4, eta: 0.5}")
    shown = json.loads(cli("show", write_study(tmp_path), *overrides, "--json").stdout)
    assert shown["study"]["images"]["count"] == 3
    assert shown["study"]["sampler"] == {"name": "ddim", "steps": 4, "eta": 0.5}
    assert {row["steps"] for row in shown["rows"]} == {4}


# --- a finished run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cli: Cli, write_study: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a launched study; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    launched = cli("launch", write_study(folder), "-o", folder / "out")
    assert launched.exit_code == 0, launched.stderr
    return folder / "out"


def test_table_has_four_forms(cli: Cli, finished: Path) -> None:
    names = [variant["name"] for variant in VARIANTS]
    markdown = cli("table", finished).stdout.splitlines()
    assert [line.split("|")[1].strip() for line in markdown if line.startswith("|")][2:] == names
    assert " fid-toy (N=" in markdown[0]
    written = csv.DictReader(io.StringIO(cli("table", finished, "-f", "csv").stdout))
    records = json.loads(cli("table", finished, "--json").stdout)
    assert [row["variant"] for row in written] == names
    assert [record["variant"] for record in records] == names
    latex = cli("table", finished, "--format", "latex").stdout
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
    assert cli("table", finished, "-f", "json").stdout == cli("table", finished, "--json").stdout
    assert cli("table", finished / "results.json").stdout.splitlines() == markdown


def test_table_takes_several_runs(cli: Cli, finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "results.json", tmp_path)
    records = json.loads(cli("table", finished, tmp_path, "--json").stdout)
    assert len(records) == 2 * len(VARIANTS)
    twice = cli("table", finished, finished)
    assert (twice.exit_code, twice.stdout) == (2, "")
    assert "given twice" in twice.stderr


def test_report_writes_its_files_again(
    cli: Cli, write_study: Write, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {name: (out / name).read_bytes() for name in ("table.md", "gallery.png")}
    results = (out / "results.json").read_bytes()
    for name in ("table.md", "gallery.png", "report.html"):
        (out / name).unlink()
    told = cli("report", write_study(tmp_path), "-o", out)
    assert told.exit_code == 0
    assert {str(out / name) for name in ("table.md", "gallery.png", "report.html")} <= set(
        told.stdout.splitlines()
    )
    assert all((out / name).read_bytes() == content for name, content in before.items())
    assert "<html" in (out / "report.html").read_text()
    assert (out / "results.json").read_bytes() == results
    # whoever scored last was killed before it wrote what it had scored
    manifest = (out / "manifest.json").read_text()
    older = json.loads(manifest)
    older["fingerprints"] = dict.fromkeys(older["fingerprints"], "0")
    (out / "manifest.json").write_text(json.dumps({**older, "device": "of another time"}))
    assert cli("report", write_study(tmp_path), "-o", out).exit_code == 0
    assert json.loads((out / "manifest.json").read_text()) == json.loads(manifest)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["-s", "images.seed=9"], "is not of this study: made otherwise: '"),
        (["-s", "sampler.steps=4"], "is not of this study: made otherwise: '"),
        (["-s", "variants.0.name=another"], "not scored: 'another'; scored, but not in it: '"),
        (["-s", "images.count=12"], "is not of this study: 10 images a row instead of 12;"),
        (["-s", "metrics.0.extrapolate=false"], "fid.extrapolat"),
    ],
    ids=str,
)
def test_report_does_not_put_old_numbers_under_a_new_configuration(
    change: list[str],
    complaint: str,
    cli: Cli,
    write_study: Write,
    finished: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    told = refusal(cli("report", write_study(tmp_path), "-o", out, *change))
    assert complaint in told
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before


def test_report_takes_what_is_said_of_rows_from_the_study_as_it_is(
    cli: Cli, write_study: Write, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    name = VARIANTS[0]["name"]
    change = f"paper={json.dumps({name: {'fid': 4.56}})}"
    assert cli("report", write_study(tmp_path), "-o", out, "-s", change).exit_code == 0
    assert "fid 4.56" in (out / "table.md").read_text()


def test_evaluate_scores_again(
    cli: Cli, write_study: Write, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "results.json").unlink()
    assert cli("evaluate", write_study(tmp_path), "-o", out).exit_code == 0
    assert (out / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_a_rest_is_told_by_the_exit_status(
    cli: Cli, write_study: Write, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    next(out.glob("full-precision-*/chunks/000004-000007.safetensors")).unlink()
    ended = cli("evaluate", write_study(tmp_path), "-o", out)
    assert ended.exit_code == 1
    assert "image 4 of 10 is missing" in ended.stdout
    rows = json.loads((out / "results.json").read_text())["variants"]
    assert [row["status"] for row in rows] == ["partial", "done", "done"]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Folder name to its pictures ``[N, H, W]``."""
    found = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(inner.iterdir())
        assert [path.name for path in files] == [f"{i:06d}.png" for i in range(len(files))]
        arrays = [np.array(Image.open(path)) for path in files]
        found[inner.name] = torch.from_numpy(np.stack(arrays))
    return found


def test_exported_pictures_are_the_chunks(cli: Cli, finished: Path, tmp_path: Path) -> None:
    told = cli("export", finished, tmp_path)
    assert told.exit_code == 0
    pictures = exported(tmp_path)
    assert len(pictures) == len(VARIANTS)
    for name, pixels in pictures.items():
        chunks = sorted((finished / name / "chunks").glob("*.safetensors"))
        images = torch.cat([load_file(chunk)["images"] for chunk in chunks])
        assert torch.equal(pixels[:, None], images)
        assert f"{tmp_path / name}: 10 images" in told.stdout
    assert not torch.equal(*list(pictures.values())[:2])


def test_exported_are_the_images_of_the_table(
    cli: Cli, finished: Path, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    """Another tool's FID of them would differ for no visible reason, were there others."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    fewer = ("-s", "images.count=6", "-s", f"variants={json.dumps(VARIANTS[:2])}")
    assert cli("evaluate", write_study(tmp_path), "-o", out, *fewer).exit_code == 0
    whole = cli("export", out, tmp_path / "pictures")
    told = whole.stdout
    assert whole.exit_code == 0
    assert {name[:-9]: len(found) for name, found in exported(tmp_path / "pictures").items()} == {
        "full-precision": 6,
        "cached": 6,
    }
    assert "not rows of this study now, and left out: cached-iec-" in told
    assert cli("export", out, tmp_path / "pictures").exit_code == 0
    assert cli("export", finished, tmp_path / "before").exit_code == 0
    mixed = refusal(cli("export", out, tmp_path / "before"))
    assert "000006.png: is of another export; wanted an empty folder" in mixed
    (row,) = out.glob("cached-????????")
    VariantFolder(row).drop_images(VariantFolder(row).finished()[0])
    told = cli("export", out, tmp_path / "again")
    assert "2 of 6 images; others were deleted after use (execution.keep_images)" in told.stdout
    assert told.exit_code == 1
    assert cli("export", out, tmp_path / "all", "--variant", "cached + IEC").exit_code == 0
    assert [len(found) for found in exported(tmp_path / "all").values()] == [10]
    assert cli("export", out, tmp_path / "some", "--variant", "cached-").exit_code == 1


def test_export_says_what_1000_images_take_in_either_form(
    cli: Cli, finished: Path, tmp_path: Path
) -> None:
    told = cli("export", finished, tmp_path).stdout.splitlines()[-1]
    images = 10 * len(VARIANTS)
    png = sum(path.stat().st_size for path in tmp_path.glob("*/*.png"))
    chunks = sum(path.stat().st_size for path in finished.glob("*/chunks/*"))
    assert told == (
        f"1,000 images take {quantity(1000 * png / images, 'B')} as PNG files, "
        f"{quantity(1000 * chunks / images, 'B')} as chunk files"
    )


def test_an_export_of_no_images_yet_says_so(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out" / "row-00000000" / "chunks").mkdir(parents=True)
    told = cli("export", tmp_path / "out", tmp_path / "png")
    assert (told.exit_code, told.stdout) == (1, f"{tmp_path}/png/row-00000000: 0 images\n")


def test_an_export_names_the_rows_that_have_nothing_yet(
    cli: Cli, finished: Path, tmp_path: Path
) -> None:
    """Another tool would score whatever is there."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (row,) = out.glob("cached-iec-*")
    shutil.rmtree(row)
    told = cli("export", out, tmp_path / "png")
    assert told.exit_code == 1
    assert f"{row.name}: 0 of 10 images; nothing is there" in told.stdout
    assert len(exported(tmp_path / "png")) == 2
    assert "is a run folder; wanted an empty folder" in refusal(cli("export", finished, out))


def test_exported_names_are_numbers(tmp_path: Path) -> None:
    """Of more than a million images some have a digit more, and are not less for that."""
    for name in ("999999.png", "1000000.png"):
        (tmp_path / "row").mkdir(exist_ok=True)
        (tmp_path / "row" / name).touch()
    _refuse_others(tmp_path, {"row": 1_000_001})
    with pytest.raises(ConfigError, match=r"1000000.png: is of another export"):
        _refuse_others(tmp_path, {"row": 1_000_000})
    (tmp_path / "row" / "cat.png").touch()
    with pytest.raises(ConfigError, match=r"cat.png: is of another export"):
        _refuse_others(tmp_path, {"row": 1_000_001})


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("cached", ["cached-"]),
        ("cached + IEC", ["cached-iec-"]),
        ("cached-", ["cached-"]),
        ("full", ["full-precision-"]),
        ("cach", ["cached-", "cached-iec-"]),
    ],
)
def test_one_row_may_be_exported(
    cli: Cli, finished: Path, tmp_path: Path, asked: str, found: list[str]
) -> None:
    assert cli("export", finished, tmp_path, "--variant", asked).exit_code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name[:-8] for name in names] == sorted(found, key=lambda name: name + "0")


# --- reference statistics ---------------------------------------------------------------------


@pytest.fixture
def collections(tmp_path: Path) -> dict[str, str]:
    """The same 6 images of 28x28 as a folder, npz and zip files and a data set of torchvision."""
    pixels = np.random.default_rng(3).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"{index}.png")
    np.savez(tmp_path / "images.npz", pixels[..., None])
    shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "folder")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", pixels[:, 0, 0] % 10)):
            shape = struct.pack(f">{array.ndim}I", *array.shape)
            content = struct.pack(">HBB", 0, 8, array.ndim) + shape + array.tobytes()
            (raw / f"{stem}-{kind}-ubyte").write_bytes(content)
            (raw / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    return {
        "folder": str(tmp_path / "folder"),
        "npz": str(tmp_path / "images.npz"),
        "zip": str(tmp_path / "images.zip"),
        "torchvision": f"torchvision:FashionMNIST:{tmp_path}:train",
    }


@pytest.mark.parametrize("kind", ["folder", "npz", "zip", "torchvision"])
@pytest.mark.parametrize("count", [None, 4])
def test_reference_is_mean_and_covariance_of_the_features(
    cli: Cli, toy: Toy, collections: dict[str, str], tmp_path: Path, kind: str, count: int | None
) -> None:
    out = tmp_path / "new" / "reference.safetensors"
    options = ["--features", toy.features, "--pad", 2, "--size", 8]
    limit = [] if count is None else ["--count", count]
    told = cli("reference", collections[kind], out, *options, *limit)
    assert told.exit_code == 0, told.stderr
    number = count or 6
    assert told.stdout == f"{out}: {number} images, 64 features\n"
    images, prepare = open_images(collections["npz"]), ImagePreparation(pad=2, size=8)
    pixels = torch.stack([prepare(images.image(index)) for index in range(number)])
    features = ClassifierFeatures(toy.features).extract(pixels).features.double().numpy()
    found = ReferenceStatistics.load(out)
    assert found.count == number
    np.testing.assert_allclose(found.mu, features.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.sigma, np.cov(features.T), rtol=1e-5, atol=1e-9)
    assert found.source["images"] == collections[kind]
    assert found.source["preparation"] == {"pad": 2, "size": 8, "channels": None}


def test_reference_prepares_as_it_is_told(
    cli: Cli, toy: Toy, collections: dict[str, str], tmp_path: Path
) -> None:
    pixels = {}
    for resize in ("area", "bilinear", "bicubic", "lanczos", "adm"):
        options = ["--features", toy.features, "--size", 8, "--resize", resize]
        assert cli("reference", collections["zip"], tmp_path / resize, *options).exit_code == 0
        source = ReferenceStatistics.load(tmp_path / resize).source
        assert source["preparation"].get("resize", "area") == resize
        pixels[source["pixels"]] = resize
    assert len(pixels) == 5


def test_a_reference_replaces_nothing_but_a_reference(
    cli: Cli, toy: Toy, collections: dict[str, str], tmp_path: Path
) -> None:
    options = ["--features", toy.features, "--pad", 2, "--size", 8]
    for _ in range(2):
        made = cli("reference", collections["npz"], tmp_path / "made.safetensors", *options)
        assert made.exit_code == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text("study: mine")
    told = refusal(cli("reference", collections["npz"], mine, *options))
    assert (
        f"OUT {mine}: is there, and no reference; delete it, or give the name of a new file" in told
    )
    assert mine.read_text() == "study: mine"


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["launch", "calibrate", "generate", "evaluate", "analyze", "show"])
def test_a_file_where_the_run_folder_should_be(
    cli: Cli, write_study: Write, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        told = refusal(cli(verb, write_study(tmp_path), "-o", out))
        assert told == f"{tmp_path / 'file'}: is a file, wanted a folder"


def test_a_file_where_the_claims_should_be(cli: Cli, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("claims"))
    (out / "claims").touch()
    assert refusal(cli("status", out)) == f"{out / 'claims'}: is a file, wanted a folder"


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(("verb", "option"), [("show", "--tflops"), ("analyze", "--budget")])
def test_a_number_that_is_none_is_refused(
    cli: Cli, write_study: Write, tmp_path: Path, verb: str, option: str, number: str
) -> None:
    told = cli(verb, write_study(tmp_path), option, number)
    assert told.exit_code == 2
    assert f"'{number}' is not a finite number" in told.stderr


def refusal(result: Result) -> str:
    """The one message of a refused command, without the program's name."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    head, _, message = result.stderr.partition("iec-eval: ")
    assert "iec-eval: " not in message
    assert not head or head.endswith("\n")  # progress, at most
    return message.rstrip("\n")


KNOWN = (
    "calibration, controls, doubtful, execution, images, metrics, model, paper, sampler, study, "
    "variants"
)
IEC_ON = [{"name": "iec row", "callbacks": [{"name": "iec"}]}]


def iec(**options: Any) -> dict[str, Any]:
    return {"variants": [{"name": "row", "callbacks": [{"name": "iec", **options}]}]}


def deepcache(**options: Any) -> dict[str, Any]:
    return {"variants": [{"name": "row", "efficiency": [{"name": "deepcache", **options}]}]}


STUDY_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"imges": {"count": 3}},
        f"study STUDY: unknown key 'imges'; did you mean 'images'? (known: {KNOWN})",
    ),
    "no number": (
        iec(weights=[math.nan]),
        "row: callbacks[0]: iec: weights.0: Input should be a finite number, got nan",
    ),
    "no bound": (
        iec(tolerance=math.inf),
        "row: callbacks[0]: iec: tolerance: Input should be a finite number, got inf",
    ),
    "unknown key inside": (
        {"images": {"cuont": 3}},
        "study STUDY: unknown key 'images.cuont'; did you mean 'count'? "
        "(known: count, seed, seeds)",
    ),
    "unknown key of a variant": (
        {"variants": [{"name": "a", "callback": []}]},
        "study STUDY: unknown key 'variants.0.callback'; did you mean 'callbacks'? "
        "(known: callbacks, efficiency, extends, name, sampler)",
    ),
    "missing key": ({"metrics": []}, "study STUDY: metrics: List should have at least 1 item"),
    "wrong type": (
        {"images": {"count": "many"}},
        "study STUDY: images.count: Input should be a valid integer, got 'many'",
    ),
    "no devices": (
        {"execution": {"devices": 0}},
        "study STUDY: execution.devices: wanted at least 1, got 0",
    ),
    "unknown control": (
        {"controls": ["full"]},
        "study STUDY: controls.0: Input should be 'full-precision', 'full-precision+iec', "
        "'equal-cost', 'heun', 'zero-cost', 'halves' or 'naive-stacking', got 'full'",
    ),
    "no rows": ({"variants": []}, "study 'toy': no variants and no controls, nothing to do"),
    "double row": (
        {"variants": [{"name": "a"}, {"name": "a"}]},
        "two variants are called 'a'; names must differ",
    ),
    "unknown base": (
        {"variants": [{"name": "cached"}, {"name": "a", "extends": "cashed"}]},
        "unknown variant that 'a' extends: 'cashed'; did you mean 'cached'? (available: cached)",
    ),
    "unknown row in paper": (
        {"paper": {"cachd": {"fid": 1.0}}},
        "unknown variant in paper: 'cachd'; did you mean 'cached'? "
        "(available: cached, cached + IEC, full precision)",
    ),
    "nameless part": ({"sampler": {"steps": 3}}, "full precision: sampler: wanted a name, got"),
    "unknown option": (
        {"sampler": {"name": "ddim", "stesp": 3}},
        "full precision: sampler: ddim: unknown key 'stesp'; did you mean 'steps'? "
        "(known: clip_sample, eta, spacing, steps)",
    ),
    "option of the wrong type": (
        {"sampler": {"name": "ddim", "steps": "5"}},
        "full precision: sampler: ddim: steps: Input should be a valid integer, got '5'",
    ),
    "too many steps": (
        {"sampler": {"name": "ddim", "steps": 101}},
        "ddim: 101 steps wanted, the model has 100 timesteps",
    ),
    "unknown model": (
        {"model": {"name": "fashion-mnits"}},
        "unknown model 'fashion-mnits'; did you mean 'fashion-mnist'? (available: ",
    ),
    "unknown sampler": (
        {"sampler": {"name": "dimm"}},
        "unknown sampler 'dimm'; did you mean 'ddim'? (available: ",
    ),
    "unknown method": (
        {"variants": [{"name": "row", "efficiency": [{"name": "deepcach"}]}]},
        "unknown efficiency method 'deepcach'; did you mean 'deepcache'? (available: ",
    ),
    "unknown callback": (
        {"variants": [{"name": "row", "callbacks": [{"name": "ieec"}]}]},
        "unknown callback 'ieec'; did you mean 'iec'? (available: ",
    ),
    "unknown metric": (
        {"metrics": [{"name": "fidd"}]},
        "unknown metric 'fidd'; did you mean 'fid'? (available: ",
    ),
    "interval 0": (
        deepcache(interval=0),
        "row: efficiency[0]: deepcache: interval: Input should be greater than or equal to 1, "
        "got 0",
    ),
    "long interval": (
        deepcache(interval=6),
        "row: deepcache: interval 6 is longer than the run of 5 steps; give at most 5",
    ),
    "no interval": (deepcache(), "row: efficiency[0]: deepcache: 'interval' is missing"),
    "deep cut": (
        deepcache(interval=2, cut=5),
        "row: deepcache: cut 5 wanted, this network has 4 at most",
    ),
    "two cachers": (
        {"variants": [{"name": "row", "efficiency": [{"name": "deepcache", "interval": 2}] * 2}]},
        "row: 'deepcache' and 'deepcache' are both cachers; a run has room for one",
    ),
    "ends above one": (
        iec(where={"ends": "3/2"}),
        "row: callbacks[0]: iec: where.ends: wanted a share between 0 and 1, got '3/2'",
    ),
    "ends of words": (
        iec(where={"ends": "tenth"}),
        "row: callbacks[0]: iec: where.ends: wanted a fraction such as 1/10, got 'tenth'",
    ),
    "ends misspelled": (
        iec(where={"end": "1/10"}),
        "row: callbacks[0]: iec: 'where.ends' is missing; unknown key 'where.end'; "
        "did you mean 'ends'? (known: ends)",
    ),
    "steps outside": (
        iec(where=[0, 5]),
        "row: iec: where lists steps [5], the run has 0..4",
    ),
    "weights twice": (
        iec(weights=[1.0], corrections=2),
        "row: callbacks[0]: iec: weights and corrections say the same thing; give one of them",
    ),
    "clipping sampler": (
        {**iec(), "sampler": {"name": "ddim", "steps": 5, "clip_sample": True}},
        "row: iec: the sampler clips the predicted image, which breaks the correction's "
        "mathematics; switch clipping off or set allow_clipping: true",
    ),
    "missing model": (
        {"model": {"name": "unet", "path": "/nowhere"}},
        "model: /nowhere/unet/config.json not found; wanted a folder with unet/ and scheduler/",
    ),
    "guidance": (
        {"model": {"name": "unet", "path": "TOY", "guidance": 2.0}},
        "model TOY: guidance needs a class-conditional network and unconditional_class, the class "
        "it was trained to take for 'no label'",
    ),
    "label": (
        {"model": {"name": "unet", "path": "TOY", "label": 9}},
        "label 9: the model has 4 classes",
    ),
    "few images": (
        {"metrics": [{"name": "fid", "features": "TOY/features", "reference": "TOY/REFERENCE"}]},
        "fid: 10 images, wanted 64 or more, the dimensions of a feature: below that the covariance "
        "is singular and FID far too high; use more images, or set allow_biased: true to have the "
        "number all the same",
    ),
    "few images for the splits": (
        {"metrics": [{"name": "is", "features": "TOY/features", "splits": 11}]},
        "is: 10 images in 11 splits leaves some empty; use more images or fewer splits",
    ),
    "no reference": (
        {"metrics": [{"name": "fid", "features": "TOY/features", "reference": "nowhere"}]},
        "reference 'nowhere': wanted a file or one of fashion-mnist, found neither; "
        "make a file with iec-eval reference IMAGES OUT",
    ),
    "other protocol": (
        {"metrics": [{"name": "fid", "features": "fashion-mnist", "reference": "TOY/REFERENCE"}]},
        "fid: reference 'TOY/REFERENCE' was made by another protocol than this metric's features "
        "(network: 'classifier toy, width 4, 4 classes' there, ",
    ),
    "damaged reference": (
        {"metrics": [{"name": "fid", "features": "TOY/features", "reference": "TMP/damaged"}]},
        "reference TMP/damaged: not reference statistics (",
    ),
    "unknown features": (
        {"metrics": [{"name": "is", "features": "incepton"}]},
        "unknown feature network 'incepton'; did you mean 'inception'? (available: fashion-mnist, "
        "inception) (or a folder holding features.json and features.safetensors)",
    ),
    "inception without weights": (
        {"metrics": [{"name": "is", "features": "inception", "weights": "/nowhere/inception"}]},
        "features inception: no weights at /nowhere/inception; nothing is downloaded here, so get",
    ),
    "shape": (
        {"metrics": [{"name": "is", "features": "fashion-mnist", "splits": 2}]},
        "wanted images of shape (1, 16, 16), got (1, 8, 8); use features made for these images",
    ),
}

LACKING = {"no reference", "inception without weights"}  # no mistake for show: it lists them


def filled(value: Any, places: dict[str, str]) -> Any:
    """Placeholders of a message or a study replaced by paths."""
    if isinstance(value, str):
        for name, path in places.items():
            value = value.replace(name, path)
        return value
    if isinstance(value, dict):
        return {key: filled(inner, places) for key, inner in value.items()}
    return [filled(inner, places) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("mistake", STUDY_MISTAKES)
def test_a_mistake_in_a_study_gets_one_clear_message(
    cli: Cli, write_study: Write, toy: Toy, tmp_path: Path, mistake: str
) -> None:
    (tmp_path / "damaged").write_bytes(toy.reference.read_bytes()[:-9])
    places = {
        "STUDY": str(tmp_path / "study.yaml"),
        "REFERENCE": toy.reference.name,
        "TOY": str(toy.folder),
        "TMP": str(tmp_path),
    }
    changes, message = (filled(value, places) for value in STUDY_MISTAKES[mistake])
    verb = "evaluate" if mistake in LACKING else "show"
    told = refusal(cli(verb, write_study(tmp_path, **changes), "-o", tmp_path / "out"))
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("images.count", "override 'images.count': wanted key.path=value"),
        ("=3", "override '=3': wanted key.path=value"),
        ("images.count=[1", "override 'images.count=[1': the value is not valid YAML: "),
        ("images.count=1.5", "images.count: Input should be a valid integer, got 1.5"),
        ("study.name=a", "override 'study.name=a': 'name' is inside a plain value"),
        ("variants.3.name=a", "override 'variants.3.name=a': '3' is not one of 0..2"),
        ("variants.².name=a", "override 'variants.².name=a': '²' is not one of 0..2"),
        ("variants.first.name=a", "'first' is not one of 0..2"),
        ("imagse.count=3", "unknown key 'imagse'; did you mean 'images'?"),
    ],
)
def test_a_wrong_override_gets_one_clear_message(
    cli: Cli, write_study: Write, tmp_path: Path, override: str, message: str
) -> None:
    assert message in refusal(cli("show", write_study(tmp_path), "-s", override))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"study: [", "study STUDY: not valid YAML: "),
        (b"- 1\n- 2\n", "study STUDY: wanted a mapping of keys, got list"),
        (b"", "study STUDY: wanted a mapping of keys, got NoneType"),
        (b"\xff\xfe\x00", "study STUDY: not valid YAML: "),
        (b"study: !!python/object/apply:os.getcwd []", "study STUDY: not valid YAML: "),
    ],
)
def test_a_file_that_is_no_study_is_refused(
    cli: Cli, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(content)
    assert refusal(cli("show", path)).startswith(message.replace("STUDY", str(path)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/study.yaml", "study '/nowhere/study.yaml': no such file"),
        ("study.yaml", "study 'study.yaml': no such file"),
        ("quikstart", "unknown study 'quikstart'; did you mean 'quickstart'? (available: "),
    ],
)
@pytest.mark.parametrize("verb", ["show", "launch", "generate", "evaluate", "report"])
def test_a_missing_study_is_refused_by_every_verb(
    cli: Cli, tmp_path: Path, verb: str, source: str, message: str
) -> None:
    assert refusal(cli(verb, source, "-o", tmp_path / "out")).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("accelerator", ["gpus", "tpu"])
def test_an_accelerator_that_is_not_there_is_refused(
    cli: Cli, write_study: Write, tmp_path: Path, accelerator: str
) -> None:
    words = "launch", write_study(tmp_path), "-o", tmp_path / "out"
    result = cli(*words, "-s", f"execution.accelerator={accelerator}")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("iec-eval: execution: Lightning cannot start")


@pytest.mark.parametrize("shard", ["3", "3/3", "a/b", "-1/4", "²/4", "", "1/2/3", "0/0"])
def test_a_wrong_shard_is_refused(cli: Cli, write_study: Write, tmp_path: Path, shard: str) -> None:
    out = tmp_path / "out"
    told = refusal(cli("generate", write_study(tmp_path), "-o", out, f"--shard={shard}"))
    assert told == f"--shard {shard!r}: wanted I/N with I from 0 to N-1, such as 3/16"


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    cli: Cli, write_study: Write, toy: Toy, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    below, others = tmp_path / "file" / "out", [Path("/proc/out"), tmp_path / ("x" * 300)]
    study = write_study(tmp_path)
    np.savez(tmp_path / "a.npz", np.zeros((9, 8, 8, 1), dtype=np.uint8))
    for out in (below, *others):
        for words in (
            ("launch", study, "-o", out),
            ("generate", study, "-o", out),
            ("export", finished, out),
            ("reference", tmp_path / "a.npz", out / "r", "--features", toy.features),
        ):
            told = refusal(cli(*words))
            if out == below:
                assert told == f"{tmp_path / 'file'}: is a file, wanted a folder"
            else:
                assert told.startswith(f"cannot write {out}")
                assert "choose another place, then run the same command again" in told


def break_weights(path: Path, how: str) -> None:
    tensors = load_file(path)
    if how == "missing key":
        del tensors["conv_in.bias"]
    elif how == "wrong shape":
        tensors["conv_in.bias"] = torch.zeros(9)
    elif how == "unknown key":
        tensors["conv_inn.bias"] = torch.zeros(1)
    save_file(tensors, path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "pickle":
        torch.save({"code": print}, path)


WEIGHT_MISTAKES = {
    "missing key": "key 'conv_in.bias' is missing, wanted shape (8,)",
    "wrong shape": "key 'conv_in.bias' has shape (9,), wanted (8,)",
    "unknown key": "unknown keys ['conv_inn.bias'], 1 in all",
    "truncated": "cannot be read (",
    "pickle": "files that contain pickled code are refused",
}


@pytest.mark.parametrize("how", WEIGHT_MISTAKES)
def test_weights_that_do_not_fit_stop_the_study(
    cli: Cli, write_study: Write, toy: Toy, tmp_path: Path, how: str
) -> None:
    study, out, path = with_broken_weights(write_study, toy, tmp_path, how)
    told = refusal(cli("launch", study, "-o", out))
    assert told.startswith(f"weights {path}: ")
    assert WEIGHT_MISTAKES[how] in told
    assert not list(out.glob("*/chunks/*"))


def test_a_real_process_says_it_without_a_traceback(
    run: Callable[..., Any], write_study: Write, toy: Toy, tmp_path: Path
) -> None:
    study, out, path = with_broken_weights(write_study, toy, tmp_path, "truncated")
    ended = run("launch", study, "-o", out)
    assert (ended.returncode, ended.stdout) == (2, "")
    complaints = [line for line in ended.stderr.splitlines() if "0/60 images" not in line]
    assert len(complaints) == 1
    assert complaints[0].startswith(f"iec-eval: weights {path}: cannot be read (")


def with_broken_weights(
    write_study: Write, toy: Toy, tmp_path: Path, how: str
) -> tuple[Path, Path, Path]:
    folder = tmp_path / "model"
    shutil.copytree(toy.folder, folder)
    path = folder / "unet" / toy.weights.name
    break_weights(path, how)
    study = write_study(tmp_path, model={"name": "unet", "path": str(folder)})
    return study, tmp_path / "out", path


def test_a_table_of_nothing_is_refused(cli: Cli, tmp_path: Path, finished: Path) -> None:
    told = refusal(cli("table", tmp_path))
    assert told == f"results {tmp_path}/results.json: no such file; evaluate the study first"
    told = refusal(cli("table", finished, tmp_path / "nowhere"))
    assert told.startswith(f"results {tmp_path}/nowhere/results.json: no such file")


def test_tables_of_different_protocols_are_refused(
    cli: Cli, tmp_path: Path, finished: Path
) -> None:
    other = json.loads((finished / "results.json").read_text())
    other["protocol"]["is"]["splits"]["count"] = 3
    (tmp_path / "results.json").write_text(json.dumps(other))
    told = refusal(cli("table", finished, tmp_path))
    assert "different protocols, which differ in is.splits.count (2 and 3)" in told


def test_a_report_without_results_is_refused(cli: Cli, write_study: Write, tmp_path: Path) -> None:
    told = refusal(cli("report", write_study(tmp_path), "-o", tmp_path / "out"))
    assert told.endswith("results.json: no such file; evaluate the study first")


def test_an_export_of_nothing_is_refused(cli: Cli, tmp_path: Path, finished: Path) -> None:
    told = refusal(cli("export", tmp_path, tmp_path / "png"))
    assert told == f"{tmp_path}: no images of a run there"
    told = refusal(cli("export", finished, tmp_path / "png", "--variant", "W8A8"))
    names = ", ".join(sorted(path.parent.name for path in finished.glob("*/chunks")))
    assert told == f"{finished}: no variant 'W8A8' there (folders: {names})"
    assert not (tmp_path / "png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "images 'nowhere': wanted a folder, a .zip or .npz file or torchvision:"),
        (["one.npz"], "reference of one.npz: wanted two images or more, got 1"),
        (["five.npz", "--count", "6"], "6 images wanted, the collection has 5"),
        (["five.npz", "--size", "7"], "wanted images of shape (1, 8, 8), got (1, 7, 7)"),
        (["five.npz", "--channels", "3"], "wanted images of shape (1, 8, 8), got (3, 8, 8)"),
        (["five.npz", "--features", "here"], "unknown feature network 'here' (available: "),
        (["text.npz"], "text.npz: not a readable npz file ("),
        (["text.zip"], "text.zip: not a readable zip file ("),
        (["five.npz", "--size", "7", "--resize", "none"], "wants images of 7x7 pixels, got 8x8"),
        (["five.npz", "--keep-features", "6"], "features of 6 images to be kept, there are 5"),
        (["torchvision:MNIST"], "images 'torchvision:MNIST': wanted torchvision:NAME:ROOT:SPLIT"),
    ],
)
def test_a_reference_that_cannot_be_made_is_refused(
    cli: Cli,
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("one", 1), ("five", 5)):
        np.savez(f"{name}.npz", np.zeros((count, 8, 8, 1), dtype=np.uint8))
    Path("text.npz").write_text("hello")
    Path("text.zip").write_text("hello")
    images, *options = words
    told = refusal(cli("reference", images, "out", "--features", toy.features, *options))
    assert message in told
    assert not Path("out").exists()


def test_training_needs_classes(cli: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 1), dtype=np.uint8))
    told = refusal(cli("train", tmp_path / "a.npz", tmp_path / "out", "--tag", "toy"))
    assert told == (
        f"images '{tmp_path}/a.npz' have no classes; the recipe trains a classifier, so put each "
        "class in a folder of its own"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lunch"], "No such command 'lunch'"),
        (["show"], "Missing argument 'STUDY'"),
        (["table", ".", "-f", "xml"], "'xml' is not one of 'md', 'csv', 'json', 'latex'"),
        (["reference", "a", "b", "--size", "0"], "0 is not in the range x>=1"),
        (["reference", "a", "b", "--pad", "-1"], "-1 is not in the range x>=0"),
        (["reference", "a", "b", "--channels", "2"], "'2' is not one of '1', '3'"),
        (["reference", "a", "b", "--resize", "cubic"], "'cubic' is not one of 'area', 'bilinear'"),
        (["reference", "a", "b", "--keep-features", "0"], "0 is not in the range x>=1"),
        (["reference", "a", "b", "--statistics", "adm"], "'adm' is not one of 'pytorch-fid'"),
        (["train", "a", "b"], "Missing option '--tag'"),
        (["train", "a", "b", "--tag", "c", "--steps", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_is_told_by_click(cli: Cli, words: list[str], message: str) -> None:
    told = cli(*words)
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith("Usage: ")
    assert message in told.stderr


def test_progress_counts_images_and_features_up_to_their_number(
    tmp_path: Path, write_study: Callable[..., Path], cli: Cli
) -> None:
    told = cli("launch", write_study(tmp_path), "-o", tmp_path / "out").stderr
    found = re.findall(r"(\d+)/(\d+) images and features", told)
    assert len(found) >= len(VARIANTS)
    # ten images of three rows, and what the feature network sees in them
    assert {total for _, total in found} == {"60"}
    assert all(0 <= int(done) <= 60 for done, _ in found)
    assert [int(done) for done, _ in found] == sorted(int(done) for done, _ in found)
