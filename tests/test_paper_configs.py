"""The studies of the paper's tables: every row, its settings, and the numbers as printed."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from iec_eval.callbacks.iec import PRESETS, Ends, IECOptions, corrected_steps
from iec_eval.cli.main import cli
from iec_eval.efficiency.cachequant import CacheQuantOptions
from iec_eval.efficiency.deepcache import DeepCacheOptions
from iec_eval.efficiency.reconstruction import ReconstructionOptions
from iec_eval.efficiency.schedules import uniform_schedule
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizerOptions
from iec_eval.options import validated
from iec_eval.plugins import load_registry
from iec_eval.study import Experiment, Study, load
from iec_eval.study_plans import plan_study

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
LABELS = FOLDER / "imagenet-50-per-class.txt"
DOCS = ROOT / "docs" / "reproducing.md"

NAMES = (
    r"(W8A8|W4A8|DeepCache N=\d+|CacheQuant N=\d+ W[48]A8)"
    r"( \+ IEC( ends 1/\d+| K=[23] (constant|halving))?)?"
)
OWN_CONTROL = "full precision + IEC at the first step"  # the only row not of the paper
NO_NUMBERS = r"(W8A8|DeepCache N=10) \+ IEC K=[23] (constant|halving)"  # in a figure only
OPTIONS: dict[str, Any] = {
    "cachequant": CacheQuantOptions,
    "deepcache": DeepCacheOptions,
    "reconstruction": ReconstructionOptions,
    "timestep-quantizer": TimestepQuantizerOptions,
}

# The tables as printed: what a row is called there, then per metric "base -> with IEC".
# Study, row, metrics of one row separated by commas.
TABLES = """
table1-cifar10      | full precision    | 4.19
table1-cifar10      | W8A8              | 4.32 -> 3.76
table1-cifar10      | W4A8              | 6.82 -> 5.96
table1-churches     | full precision    | 3.99
table1-churches     | W8A8              | 3.57 -> 3.29
table1-churches     | W4A8              | 6.27 -> 6.10
table1-bedrooms     | full precision    | 3.37
table1-bedrooms     | W8A8              | 8.97 -> 7.78
table2-cifar10      | full precision    | 4.19
table2-cifar10      | DeepCache N=3     | 4.70 -> 3.96
table2-cifar10      | DeepCache N=5     | 5.73 -> 4.83
table2-cifar10      | DeepCache N=10    | 9.74 -> 7.77
table2-cifar10      | DeepCache N=15    | 17.21 -> 14.58
table2-churches     | full precision    | 3.99
table2-churches     | DeepCache N=3     | 5.10 -> 4.73
table2-churches     | DeepCache N=5     | 6.74 -> 6.00
table2-churches     | DeepCache N=10    | 14.81 -> 13.17
table2-churches     | DeepCache N=15    | 25.27 -> 22.42
table2-bedrooms     | full precision    | 3.37
table2-bedrooms     | DeepCache N=2     | 11.21 -> 7.99
table2-bedrooms     | DeepCache N=3     | 11.86 -> 8.16
table2-bedrooms     | DeepCache N=5     | 14.28 -> 9.20
table2-bedrooms     | DeepCache N=10    | 26.09 -> 16.91
table3-cifar10      | full precision    | 4.19
table3-cifar10      | CacheQuant N=3 W8A8  | 4.61 -> 3.93
table3-cifar10      | CacheQuant N=5 W8A8  | 5.28 -> 5.09
table3-cifar10      | CacheQuant N=10 W8A8 | 8.19 -> 6.47
table3-cifar10      | CacheQuant N=15 W8A8 | 13.42 -> 10.77
table3-cifar10      | CacheQuant N=3 W4A8  | 7.27 -> 6.42
table3-cifar10      | CacheQuant N=5 W4A8  | 8.15 -> 6.90
table3-cifar10      | CacheQuant N=10 W4A8 | 11.36 -> 10.69
table3-cifar10      | CacheQuant N=15 W4A8 | 16.76 -> 15.50
table3-churches     | full precision       | 3.99
table3-churches     | CacheQuant N=3 W8A8  | 3.66 -> 3.39
table3-churches     | CacheQuant N=5 W8A8  | 3.71 -> 3.24
table3-churches     | CacheQuant N=10 W8A8 | 5.54 -> 4.25
table3-churches     | CacheQuant N=15 W8A8 | 9.47 -> 6.90
table3-churches     | CacheQuant N=3 W4A8  | 7.08 -> 6.85
table3-churches     | CacheQuant N=5 W4A8  | 7.24 -> 6.79
table3-churches     | CacheQuant N=10 W4A8 | 10.75 -> 9.69
table3-churches     | CacheQuant N=15 W4A8 | 13.28 -> 11.50
table3-bedrooms     | full precision       | 3.37
table3-bedrooms     | CacheQuant N=2 W?A8  | 8.85 -> 7.51
table3-bedrooms     | CacheQuant N=3 W?A8  | 9.27 -> 7.33
table3-bedrooms     | CacheQuant N=5 W?A8  | 10.29 -> 7.67
table3-bedrooms     | CacheQuant N=10 W?A8 | 17.53 -> 11.07
table4-imagenet     | full precision       | 3.37, 204.56
table4-imagenet     | CacheQuant N=10 W8A8 | 4.68 -> 4.15, 184.38 -> 196.20
table4-imagenet     | CacheQuant N=15 W8A8 | 5.51 -> 5.18, 174.81 -> 182.30
table4-imagenet     | CacheQuant N=20 W8A8 | 7.21 -> 6.53, 160.68 -> 169.71
table4-imagenet     | CacheQuant N=10 W4A8 | 6.90 -> 6.50, 158.27 -> 161.86
table4-imagenet     | CacheQuant N=15 W4A8 | 9.40 -> 8.66, 139.64 -> 144.41
table4-imagenet     | CacheQuant N=20 W4A8 | 12.65 -> 11.10, 124.13 -> 130.01
table4-coco         | full precision       | 22.41, 41.02, 26.89
table4-coco         | CacheQuant N=10 W8A8 | 23.65 -> 23.36, 36.71 -> 37.02, 26.41 -> 26.45
table4-coco         | CacheQuant N=5 W8A8  | 23.74 -> 22.83, 39.81 -> 40.91, 26.87 -> 26.94
table4-coco         | CacheQuant N=10 W4A8 | 26.63 -> 24.82, 34.57 -> 36.18, 26.23 -> 26.25
table4-coco         | CacheQuant N=5 W4A8  | 23.85 -> 23.80, 39.53 -> 40.27, 26.78 -> 26.80
table5-cifar10-quantization | full precision        | 4.19
table5-cifar10-quantization | W8A8                  | 4.32 -> 3.76
table5-cifar10-quantization | W8A8 + IEC ends 1/4   | 3.85
table5-cifar10-quantization | W8A8 + IEC ends 1/8   | 3.86
table5-cifar10-quantization | W8A8 + IEC ends 1/10  | 3.88
table5-cifar10-quantization | W8A8 + IEC ends 1/20  | 3.97
table5-cifar10-deepcache | full precision                 | 4.19
table5-cifar10-deepcache | DeepCache N=10                 | 9.74 -> 7.77
table5-cifar10-deepcache | DeepCache N=10 + IEC ends 1/4  | 7.92
table5-cifar10-deepcache | DeepCache N=10 + IEC ends 1/8  | 9.31
table5-cifar10-deepcache | DeepCache N=10 + IEC ends 1/10 | 9.58
table5-cifar10-deepcache | DeepCache N=10 + IEC ends 1/20 | 9.55
figure3-cifar10     | full precision    | 4.19
figure3-cifar10     | W8A8              | 4.32 -> 3.76
figure3-cifar10     | DeepCache N=10    | 9.74 -> 7.77
"""

# data set -> sampler, steps, spacing, cut, images, calibration images, batch size, released preset
SETTINGS = {
    "cifar10": ("ddim", 100, "quad", 4, 50_000, 512, 500, "official_ddim"),
    "churches": ("ddim", 100, "ldm", 1, 50_000, 512, 50, "official_ldm"),
    "bedrooms": ("ddim", 100, "ldm", 1, 50_000, 256, 50, "official_ldm"),
    "imagenet": ("ddim", 250, "ldm", 1, 50_000, 64, 50, "official_ldm"),
    "coco": ("plms", 50, None, 1, 5_000, 256, 4, None),
}
MODELS = {
    "cifar10": {"name": "ddpm-cifar10", "path": "checkpoints/ddpm-cifar10", "weights": "ema"},
    "churches": {
        "name": "ldm-lsun-churches",
        "path": "checkpoints/ldm-lsun-churches",
        "weights": "ema",
    },
    "bedrooms": {
        "name": "ldm-lsun-bedrooms",
        "path": "checkpoints/ldm-lsun-bedrooms-raw",
        "weights": "raw",
    },
    "imagenet": {
        "name": "ldm-imagenet",
        "path": "checkpoints/ldm-imagenet",
        "weights": "raw",
        "guidance": 1.5,
        "labels": "configs/paper/imagenet-50-per-class.txt",
    },
    "coco": {
        "name": "stable-diffusion-v1",
        "path": "hub:CompVis/stable-diffusion-v1-4",
        "guidance": 7.5,
        "prompts": "prompts/coco-5000.txt",
    },
}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def data_set(path: Path) -> str:
    return path.stem.split("-")[1]


def rows(study: Study) -> list[Experiment]:
    """The rows of the file, without the controls that the tool adds."""
    return [row for row in study.experiments() if not row.control]


def main_method(row: Experiment) -> dict[str, Any]:
    """The quantizer or the cache of a row."""
    return row.efficiency[0]


def cached_rows(path: Path) -> list[Experiment]:
    found = rows(load(str(path)))
    return [row for row in found if row.efficiency and "interval" in main_method(row)]


def iec(row: Experiment) -> IECOptions:
    (callback,) = row.callbacks
    return validated(IECOptions, {k: v for k, v in callback.items() if k != "name"}, row.name)


# --- which files and rows there are -------------------------------------------------------------


def test_there_is_a_study_for_each_table_and_data_set() -> None:
    lsun = ("cifar10", "churches", "bedrooms")
    wanted = {f"table{number}-{name}" for number in (1, 2, 3) for name in lsun}
    wanted |= {"table4-imagenet", "table4-coco", "figure3-cifar10"}
    wanted |= {"table5-cifar10-quantization", "table5-cifar10-deepcache"}
    assert {path.stem for path in FILES} == wanted


@each_file
def test_rows_are_named_alike(path: Path) -> None:
    study = load(str(path))
    assert study.study == path.stem
    assert [row.name for row in study.experiments()][:2] == [
        "full precision",
        "full precision + IEC",
    ]
    for row in rows(study):
        assert row.name == OWN_CONTROL or re.fullmatch(NAMES, row.name), row.name
        assert ("IEC" in row.name) == bool(row.callbacks)
        assert row.name == OWN_CONTROL or row.efficiency


@each_file
def test_a_name_says_what_the_row_is(path: Path) -> None:
    for row in rows(load(str(path))):
        first = main_method(row) if row.efficiency else {"name": "none"}
        interval = re.search(r"N=(\d+)", row.name)
        assert first.get("interval") == (int(interval[1]) if interval else None)
        quantizer = first.get("quantizer", {}) if first["name"] == "cachequant" else first
        assert quantizer.get("weight_bits", 8) == (4 if "W4A8" in row.name else 8)
        assert quantizer.get("activation_bits", 8) == 8
        word = row.name.partition(" ")[0]
        methods = {"DeepCache": "deepcache", "CacheQuant": "cachequant", "full": "none"}
        assert first["name"] == methods.get(word, "timestep-quantizer")


@each_file
def test_a_row_with_iec_repeats_the_row_it_extends(path: Path) -> None:
    study = load(str(path))
    for variant in study.variants:
        if variant.callbacks is None or variant.name == OWN_CONTROL:
            assert variant.extends is None
            continue
        assert variant.extends == variant.name.partition(" + IEC")[0]
        given = variant.model_dump(exclude_none=True)
        assert given.keys() == {"name", "extends", "callbacks"}
    known = {row.name: row for row in rows(study)}
    for name, row in known.items():
        if row.callbacks and name != OWN_CONTROL:
            base = known[name.partition(" + IEC")[0]]
            assert base.callbacks == []
            assert (row.efficiency, row.sampler) == (base.efficiency, base.sampler)


@each_file
def test_no_two_rows_are_the_same(path: Path) -> None:
    names = {row.name for row in rows(load(str(path)))}
    plans = plan_study(load(str(path)), load_registry(), [])
    found = {plan.fingerprint for plan in plans if plan.experiment.name in names}
    assert len(found) == len(names)


# --- the paper's numbers ------------------------------------------------------------------------


def printed(study: str) -> dict[str, dict[str, float]]:
    """The numbers of a study as the paper prints them, by row and metric."""
    found: dict[str, dict[str, float]] = {}
    for line in TABLES.strip().splitlines():
        name, row, numbers = (cell.strip() for cell in line.split("|"))
        if name != study:
            continue
        for bits in "84" if "?" in row else "8":
            label = row.replace("?", bits)
            for metric, pair in zip(("fid", "is", "clip-score"), numbers.split(","), strict=False):
                for suffix, value in zip(("", " + IEC"), pair.split("->"), strict=False):
                    found.setdefault(label + suffix, {})[metric] = float(value)
    return found


@each_file
def test_the_papers_numbers_are_those_printed(path: Path) -> None:
    assert load(str(path)).paper == printed(path.stem)


@each_file
def test_every_row_has_the_papers_numbers_where_there_are_any(path: Path) -> None:
    study = load(str(path))
    without = {row.name for row in rows(study)} - study.paper.keys()
    allowed = {name for name in without if name == OWN_CONTROL or re.fullmatch(NO_NUMBERS, name)}
    assert without == allowed
    assert len(without) == {"figure3-cifar10": 8, "table4-coco": 1}.get(path.stem, 0)
    metrics = {one["name"] for one in study.metrics}
    assert all(numbers.keys() <= metrics for numbers in study.paper.values())


DOUBTS = {
    "table1-cifar10": ["W4A8"],
    "table1-churches": ["W8A8 + IEC"],
    "table1-bedrooms": ["full precision", "W8A8", "W8A8 + IEC"],
    "table2-cifar10": ["DeepCache N=3", "DeepCache N=3 + IEC", "DeepCache N=15"],
    "table2-churches": ["DeepCache N=3 + IEC", "DeepCache N=15"],
    "table2-bedrooms": ["full precision", "DeepCache N=2 + IEC"],
    "table3-cifar10": ["CacheQuant N=3 W8A8", "CacheQuant N=3 W4A8"],
    "table3-churches": ["CacheQuant N=3 W8A8 + IEC"],
    "table3-bedrooms": ["full precision", "CacheQuant N=2 W8A8", "CacheQuant N=2 W4A8"],
    "table4-imagenet": ["CacheQuant N=10 W8A8 + IEC"],
    "table4-coco": ["full precision", "CacheQuant N=5 W8A8 + IEC", "CacheQuant N=10 W4A8"],
    "table5-cifar10-quantization": [],
    "table5-cifar10-deepcache": ["DeepCache N=10", "DeepCache N=10 + IEC ends 1/20"],
    "figure3-cifar10": ["W8A8 + IEC K=2 constant", "DeepCache N=10 + IEC"],
}


@each_file
def test_doubtful_rows_have_a_sentence_each(path: Path) -> None:
    doubtful = load(str(path)).doubtful
    assert set(DOUBTS[path.stem]) <= doubtful.keys()
    assert bool(DOUBTS[path.stem]) == bool(doubtful)
    for reason in doubtful.values():
        assert re.fullmatch(r"[A-Z3][^\n]{40,}\.", reason), reason
        assert "- " not in reason  # a hyphen at the end of a folded line
    figure = [reason for name, reason in doubtful.items() if re.fullmatch(NO_NUMBERS, name)]
    assert all("figure" in reason for reason in figure)


def test_each_known_doubt_is_where_it_belongs() -> None:
    words = {
        "table2-cifar10": {"DeepCache N=3": "last 4", "DeepCache N=10 + IEC": "adds 1"},
        "table2-churches": {"DeepCache N=15": "dps", "DeepCache N=5 + IEC": "two"},
        "table3-bedrooms": {"CacheQuant N=5 W8A8": "4/8", "CacheQuant N=5 W4A8": "collapses"},
        "table1-bedrooms": {"full precision": "copied", "W8A8": "per channel"},
        "table4-coco": {"full precision": "ViT-B/32", "CacheQuant N=5 W4A8": "our reading"},
    }
    for name, expected in words.items():
        doubtful = load(str(FOLDER / f"{name}.yaml")).doubtful
        assert {row: word for row, word in expected.items() if word in doubtful[row]} == expected


# --- settings -----------------------------------------------------------------------------------


@each_file
def test_settings_are_those_of_the_data_set(path: Path) -> None:
    study = load(str(path))
    sampler, steps, spacing, cut, images, calibration, batch, _ = SETTINGS[data_set(path)]
    assert study.model == MODELS[data_set(path)]
    assert study.sampler == {
        key: value
        for key, value in (("name", sampler), ("steps", steps), ("spacing", spacing))
        if value is not None
    }
    assert (study.images.seed, study.images.count) == (1243, images)
    assert (study.calibration.seed, study.calibration.images) == (1, calibration)
    assert study.execution.batch_size == batch
    assert study.execution.chunk_size % batch == images % study.execution.chunk_size == 0
    assert study.controls == ["full-precision", "full-precision+iec"]
    assert all(row.sampler == study.sampler for row in rows(study))
    assert {main_method(row)["cut"] for row in cached_rows(path)} <= {cut}


@each_file
def test_metrics_are_those_of_the_data_set(path: Path) -> None:
    by_name = {one["name"]: one for one in load(str(path)).metrics}
    coco = data_set(path) == "coco"
    assert list(by_name) == (["fid", "is", "clip-score"] if coco else ["fid", "is"])
    lsun = {"churches": "lsun-churches", "bedrooms": "lsun-bedrooms"}
    name = lsun.get(data_set(path), data_set(path))
    assert by_name["fid"]["reference"] == f"references/{name}.safetensors"
    # parts of 5,000 images everywhere, the ten of 50,000 being the default
    assert by_name["is"].get("splits", 10) == load(str(path)).images.count // 5000


@each_file
def test_every_option_exists(path: Path) -> None:
    for row in rows(load(str(path))):
        for part in row.efficiency:
            given = {key: value for key, value in part.items() if key != "name"}
            validated(OPTIONS[part["name"]], given, row.name)
        if row.callbacks:
            iec(row)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem < "table5"], ids=lambda p: p.stem)
def test_schedules_are_uniform_up_to_10_steps_and_where_caches_are_plain(path: Path) -> None:
    for row in cached_rows(path):
        method = main_method(row)
        chosen = data_set(path) in ("imagenet", "coco") or (
            method["name"] == "cachequant" and method["interval"] > 10
        )
        assert method.get("schedule", "uniform") == ("dps" if chosen else "uniform"), row.name


@pytest.mark.parametrize(
    "path", [p for p in FILES if re.match("table[134]", p.stem)], ids=lambda p: p.stem
)
def test_four_bits_are_reconstructed_with_the_rates_of_the_data_set(path: Path) -> None:
    presets = {
        "cifar10": "cifar10",
        "churches": "church",
        "bedrooms": "bedroom",
        "imagenet": "imagenet",
        "coco": "stable-diffusion",
    }
    for row in rows(load(str(path))):
        methods = {part["name"]: part for part in row.efficiency}
        learned = methods.get("reconstruction") or methods.get("cachequant", {}).get(
            "reconstruction"
        )
        assert (learned is not None) == ("W4A8" in row.name)
        if learned is not None:
            assert learned["preset"] == presets[data_set(path)]
            by_layer = "block" if data_set(path) == "coco" else "layer"
            assert learned.get("granularity", "block") == by_layer
            assert learned["regularizer"] == "official"  # no release applies one
        cachequant = methods.get("cachequant")
        if cachequant and data_set(path) == "cifar10" and "W8A8" in row.name:
            assert cachequant["correction"] == {"layers": ["conv_shortcut"]}


def test_quantizers_are_per_tensor_but_in_one_table() -> None:
    for path in FILES:
        for row in rows(load(str(path))):
            quantizer = main_method(row) if row.efficiency else {}
            quantizer = quantizer.get("quantizer", quantizer)
            found = (quantizer.get("search", "mse"), quantizer.get("activations", "tensor"))
            released = path.stem == "table1-bedrooms"
            assert row.name == OWN_CONTROL or found == (
                ("max", "channel") if released else ("mse", "tensor")
            )


# --- IEC ----------------------------------------------------------------------------------------


@each_file
def test_iec_is_the_papers(path: Path) -> None:
    for row in rows(load(str(path))):
        if row.callbacks:
            options = iec(row)
            assert (options.preset, options.tolerance) == ("paper", 1e-5)
            assert options.weights == [0.5] or " K=" in row.name
            first = data_set(path) == "coco"
            share = re.search(r" ends (\d+/\d+)$", row.name)
            wanted = Ends(ends=share[1]) if share else "first" if first else "full"
            assert options.where == wanted


@pytest.mark.parametrize(
    ("study", "base", "full", "wanted"),
    [
        ("quantization", "W8A8", range(100), [50, 25, 20, 10]),
        ("deepcache", "DeepCache N=10", uniform_schedule(100, 10), [5, 3, 2, 1]),
    ],
)
def test_table_5_corrects_as_many_steps_as_its_overheads_say(
    study: str, base: str, full: Any, wanted: list[int]
) -> None:
    read = load(str(FOLDER / f"table5-cifar10-{study}.yaml"))
    by_name = {row.name: row for row in rows(read)}
    names = [f"{base} + IEC ends {share}" for share in ("1/4", "1/8", "1/10", "1/20")]
    options = [iec(by_name[name]) for name in [f"{base} + IEC", *names]]
    counts = [len(corrected_steps(one.where, 100, full)) for one in options]
    assert counts == [len(full), *wanted]


def test_figure_3_has_both_ways_to_weigh_further_corrections() -> None:
    by_name = {row.name: row for row in rows(load(str(FOLDER / "figure3-cifar10.yaml")))}
    for base in ("W8A8", "DeepCache N=10"):
        weights = {
            name.removeprefix(f"{base} + IEC"): iec(row).weights
            for name, row in by_name.items()
            if name.startswith(f"{base} + IEC")
        }
        assert weights == {
            "": [0.5],
            " K=2 constant": [0.5, 0.5],
            " K=2 halving": [0.5, 0.25],
            " K=3 constant": [0.5, 0.5, 0.5],
            " K=3 halving": [0.5, 0.25, 0.125],
        }


def header(path: Path) -> str:
    """The comment a file begins with, continued lines joined."""
    lines = path.read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").strip() for line in head).replace("\\\n", " ")


def commands(text: str) -> list[list[str]]:
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [shlex.split(line) for line in lines if line.startswith("iec-eval ")]


def overrides(command: list[str]) -> list[str]:
    return [value for flag, value in pairwise(command) if flag == "-s"]


@pytest.mark.parametrize(
    "path", [p for p in FILES if re.match("table[1-4]", p.stem)], ids=lambda p: p.stem
)
def test_one_override_turns_every_row_with_iec(path: Path) -> None:
    plain = load(str(path))
    turned = load(str(path), ["variants.1.callbacks.0.preset=heun"])
    assert sum(bool(row.callbacks) for row in rows(plain)) >= 1
    for before, after in zip(rows(plain), rows(turned), strict=True):
        if before.callbacks:
            assert after.callbacks == [{**before.callbacks[0], "preset": "heun"}]
            after = after.model_copy(update={"callbacks": before.callbacks})
        assert after == before


@each_file
def test_the_released_preset_is_a_command_away(path: Path) -> None:
    released = SETTINGS[data_set(path)][-1]
    found = [c for c in commands(header(path)) if any("preset=" in o for o in overrides(c))]
    assert len(found) == (released is not None)
    for command in found:
        turned = load(str(ROOT / command[2]), overrides(command))
        assert turned.study == path.stem
        presets = {row.name: row.callbacks[0]["preset"] for row in rows(turned) if row.callbacks}
        assert set(presets.values()) == {released}, presets


@each_file
def test_the_header_names_what_is_needed_and_commands_that_load(path: Path) -> None:
    text, study = header(path), load(str(path))
    needed = [study.model["path"], study.model.get("prompts", ""), study.metrics[0]["reference"]]
    assert all(name in text for name in needed)
    shown = commands(text)
    assert [command[:3] for command in shown[:2]] == [
        ["iec-eval", verb, f"configs/paper/{path.name}"] for verb in ("show", "launch")
    ]
    for command in shown:
        assert load(str(ROOT / command[2]), overrides(command)).experiments()


@each_file
def test_every_override_in_a_comment_has_an_effect(path: Path) -> None:
    comments = re.findall(r"^\s*#(.*)$", path.read_text(), flags=re.MULTILINE)
    written = re.findall(r"-s (variants\.\d+\.efficiency\S+=[\w-]+)", " ".join(comments))
    for override in written:
        changed = load(str(path), [override])
        assert changed.variants != load(str(path)).variants
        for row in rows(changed):
            for part in row.efficiency:
                given = {key: value for key, value in part.items() if key != "name"}
                validated(OPTIONS[part["name"]], given, row.name)


def test_another_choice_of_rates_is_one_override() -> None:
    """All reconstructions of a file share their options too."""
    override = "variants.8.efficiency.0.reconstruction.preset=cifar10-cachequant"
    path = FOLDER / "table3-cifar10.yaml"
    assert override in path.read_text()
    four = [row for row in rows(load(str(path), [override])) if "W4A8" in row.name]
    presets = {main_method(row)["reconstruction"]["preset"] for row in four}
    assert (len(four), presets) == (8, {"cifar10-cachequant"})


# --- the label file -----------------------------------------------------------------------------


def test_the_labels_are_50_of_each_of_1000_classes() -> None:
    lines = [line for line in LABELS.read_text().splitlines() if not line.startswith("#")]
    assert [line.split() for line in lines] == [[str(label), "50"] for label in range(1000)]


# --- the guide ----------------------------------------------------------------------------------


def test_the_guide_names_every_study() -> None:
    text = DOCS.read_text()
    assert [path.stem for path in FILES if path.stem not in text] == []
    assert "docs/reproducing.md" in (ROOT / "README.md").read_text()


def test_the_guide_counts_the_rows() -> None:
    listed: dict[str, int] = {}
    for line in re.findall(r"^\| `table\d.*|^\| `figure3.*", DOCS.read_text(), re.MULTILINE):
        names, _, counts, *more = (cell.strip() for cell in line.strip("|").split("|"))
        if more:
            studies = re.findall(r"`(.+?)`", names)
            numbers = [int(number) for number in re.findall(r"\d+", counts)]
            numbers = numbers if len(numbers) == len(studies) else numbers * len(studies)
            listed |= zip(studies, numbers, strict=True)
    assert listed == {path.stem: len(rows(load(str(path)))) for path in FILES}


def test_the_guide_names_every_preset() -> None:
    named = re.findall(r"^\| `(\w+)` \| ", DOCS.read_text(), re.MULTILINE)
    assert sorted(set(named)) == sorted(PRESETS)


def test_commands_of_the_guide_load() -> None:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", DOCS.read_text(), flags=re.DOTALL))
    shown = [command for command in commands(blocks) if "configs/paper/" in " ".join(command)]
    assert len(shown) >= 6
    for _, verb, *words in shown:
        cli.commands[verb].make_context(verb, list(words))
        assert load(str(ROOT / words[0]), overrides(words)).experiments(), words


def test_the_guides_numbers_are_those_of_the_studies() -> None:
    """Tables in the guide: | study | row | fid ... |."""
    lines = re.findall(r"^\| `(\S+)` \| (.+?) \| ([\d., ]+) \|$", DOCS.read_text(), re.MULTILINE)
    assert len(lines) >= 10
    for study, row, numbers in lines:
        paper = load(str(FOLDER / f"{study}.yaml")).paper[row]
        assert list(paper.values()) == [float(number) for number in numbers.split(",")], row


def test_the_guides_snippet_makes_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    captions = [
        {"image_id": image, "id": 3 * image + part, "caption": f" A  picture\nof {image}, {part}. "}
        for image in reversed(range(1, 40_505))
        for part in (1, 0)
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotations").mkdir()
    content = {"annotations": captions}
    (tmp_path / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    exec(compile(snippet, "snippet", "exec"), {})
    lines = (tmp_path / "prompts" / "coco-5000.txt").read_text().split("\n")
    assert lines[:2] == ["A picture of 1, 0.", "A picture of 9, 0."]
    assert (len(lines), lines[-1]) == (5001, "")
    assert len(set(lines)) == 5001


def test_the_files_are_plain_yaml() -> None:
    for path in FILES:
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        assert max(len(line) for line in path.read_text().splitlines()) <= 120
