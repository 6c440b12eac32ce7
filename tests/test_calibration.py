"""Calibration in whole runs: what is calibrated when, kept, refused, remade and resumed."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import installed_plugin, started

from iec_eval.calibration import Bench
from iec_eval.efficiency.cachequant import CacheQuant
from iec_eval.efficiency.deepcache import DeepCache
from iec_eval.efficiency.error_correction import CacheCorrection, QuantizationCorrection
from iec_eval.efficiency.reconstruction import Reconstruction
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer
from iec_eval.models.unet import UNet
from iec_eval.results import read_results
from iec_eval.runs import RunFolder, VariantFolder
from iec_eval.storage import read_tensors

Cli = Callable[..., Result]
Part = dict[str, Any]
CACHE = {"name": "deepcache", "interval": 2, "cut": 2, "schedule": "dps"}
QUANTIZER = {"name": "timestep-quantizer", "search": "max"}
CHAIN = [CACHE, {"name": "cache-correction"}, QUANTIZER, {"name": "quantization-correction"}]
STAGES = (DeepCache, CacheCorrection, TimestepQuantizer, QuantizationCorrection, Reconstruction)
NAMES = [cls.name for cls in STAGES[:4]]


@dataclass(frozen=True)
class Run:
    """A study of one variant, and its run folder."""

    cli: Cli
    write: Callable[..., Path]
    folder: Path

    def __call__(
        self, efficiency: Sequence[Part] = CHAIN, *words: str, verb: str = "launch", **changes: Any
    ) -> Result:
        rows = [{"name": "row", "efficiency": list(efficiency)}]
        given = {"variants": rows, "calibration": {"seed": 1, "images": 4}, **changes}
        study = self.write(self.folder, **given)
        result: Result = self.cli(verb, study, "-o", self.folder / "out", *words)
        return result

    def images(self) -> torch.Tensor:
        """Of all variant folders."""
        found = []
        for path in sorted((self.folder / "out").glob("*/chunks")):
            folder = VariantFolder(path.parent)
            found += [folder.read_chunk(part).images for part in folder.finished()]
        return torch.cat(found)

    def forget_images(self) -> None:
        for path in (self.folder / "out").glob("*/chunks/*"):
            path.unlink()

    @property
    def artifacts(self) -> dict[str, Path]:
        """Files by the part's name; one run's only."""
        descriptions = (self.folder / "out" / "artifacts").glob("*.json")
        return {
            json.loads(path.read_text())["part"]: path.with_suffix(".safetensors")
            for path in descriptions
        }


@pytest.fixture
def launch(cli: Cli, write_study: Callable[..., Path], tmp_path: Path) -> Run:
    return Run(cli, write_study, tmp_path)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts that are calibrated meanwhile, in order."""
    names: list[str] = []
    for cls in STAGES:
        monkeypatch.setattr(cls, "calibrate", noting(cls, names))
    return names


def noting(cls: Any, names: list[str]) -> Callable[[Any, Bench], dict[str, torch.Tensor]]:
    before = cls.calibrate

    def calibrate(self: Any, bench: Bench) -> dict[str, torch.Tensor]:
        names.append(cls.name)
        return dict(before(self, bench))

    return calibrate


def test_a_second_launch_calibrates_nothing(launch: Run, calibrated: list[str]) -> None:
    assert launch().exit_code == 0
    assert calibrated == NAMES
    images = launch.images()
    launch.forget_images()
    assert launch().exit_code == 0
    assert calibrated == NAMES
    assert torch.equal(launch.images(), images)


def test_whoever_calibrates_claims_the_whole_chain(
    launch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes when the first part is done must not begin the second a second time."""
    held: list[int] = []
    for cls in STAGES:
        before = cls.calibrate

        def calibrate(self: Any, bench: Bench, before: Any = before) -> dict[str, torch.Tensor]:
            held.append(len(RunFolder(tmp_path / "out").claims().held()))
            return dict(before(self, bench))

        monkeypatch.setattr(cls, "calibrate", calibrate)
    assert launch(verb="calibrate").exit_code == 0
    assert held == [len(NAMES)] * len(NAMES)
    assert not RunFolder(tmp_path / "out").claims().held()


def changed(place: int, **options: Any) -> list[Part]:
    chain = [dict(part) for part in CHAIN]
    chain[place] |= options
    return chain


@pytest.mark.parametrize(
    ("chain", "anew"),
    [
        (changed(0, schedule_images=3), NAMES),
        (changed(2, weight_bits=6), NAMES[2:]),
        (changed(3, layers=["conv1"]), NAMES[3:]),
    ],
)
def test_a_changed_option_concerns_its_stage_and_the_later_ones(
    launch: Run, calibrated: list[str], chain: list[Part], anew: list[str]
) -> None:
    launch(verb="calibrate")
    calibrated.clear()
    assert launch(chain, verb="calibrate").exit_code == 0
    assert calibrated == anew


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": {"name": "ddim", "steps": 5, "spacing": "quad"}},
        {"sampler": {"name": "ddim", "steps": 6}},
        {"calibration": {"seed": 2, "images": 4}},
        {"calibration": {"seed": 1, "images": 5}},
    ],
)
def test_artifacts_of_another_setting_do_not_serve(
    launch: Run, calibrated: list[str], changes: dict[str, Any]
) -> None:
    launch(verb="calibrate")
    calibrated.clear()
    assert launch(verb="calibrate", **changes).exit_code == 0
    assert calibrated == NAMES


def test_artifacts_of_another_model_or_version_do_not_serve(
    launch: Run, calibrated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(verb="calibrate")
    calibrated.clear()
    monkeypatch.setattr(TimestepQuantizer, "version", 99)
    launch(verb="calibrate")
    assert calibrated == NAMES[2:]
    calibrated.clear()
    monkeypatch.setattr(UNet, "identity", lambda self: {"weights": "another file's hash"})
    launch(verb="calibrate")
    assert calibrated == NAMES


def test_images_and_execution_do_not_matter_to_artifacts(
    launch: Run, calibrated: list[str]
) -> None:
    launch(verb="calibrate")
    calibrated.clear()
    execution = {"batch_size": 3, "chunk_size": 2, "threads": 1, "accelerator": "cpu"}
    images = {"seed": 8, "count": 3}
    assert launch(images=images, execution=execution).exit_code == 0
    assert calibrated == []


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def swap_with(other: str) -> Callable[[Path], None]:
    def swap(path: Path) -> None:
        source = next(p for p in path.parent.glob("*.json") if other in p.read_text())
        path.write_bytes(source.with_suffix(".safetensors").read_bytes())

    return swap


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, swap_with("cache-correction")])
def test_a_damaged_artifact_is_made_again(
    launch: Run, calibrated: list[str], damage: Callable[[Path], None]
) -> None:
    launch()
    images, whole = launch.images(), launch.artifacts["timestep-quantizer"].read_bytes()
    calibrated.clear()
    launch.forget_images()
    damage(launch.artifacts["timestep-quantizer"])
    assert launch().exit_code == 0
    assert calibrated == ["timestep-quantizer"]
    assert torch.equal(launch.images(), images)
    again, _ = read_tensors(launch.artifacts["timestep-quantizer"])
    launch.artifacts["timestep-quantizer"].write_bytes(whole)
    before, _ = read_tensors(launch.artifacts["timestep-quantizer"])
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_cachequant_shares_the_artifacts_of_its_stages(launch: Run, calibrated: list[str]) -> None:
    launch(verb="calibrate")
    calibrated.clear()
    options = {key: value for key, value in CACHE.items() if key != "name"}
    composed = {"name": CacheQuant.name, **options, "quantizer": {"search": "max"}}
    assert launch([composed]).exit_code == 0
    assert calibrated == []


# --- the commands -----------------------------------------------------------------------------


def test_calibrate_says_what_there_is(launch: Run) -> None:
    rows = [{"name": "plain"}, {"name": "all", "efficiency": CHAIN}]
    result = launch(verb="calibrate", variants=rows)
    assert result.exit_code == 0
    assert "plain: nothing to calibrate" in result.stdout
    assert all(f"{name} " in result.stdout for name in NAMES)
    assert "missing" not in result.stdout


def test_show_says_what_is_calibrated_and_loads_no_weights(
    launch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch([CACHE], verb="calibrate")

    def fail(self: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(UNet, "load", fail)
    text = launch(verb="show").stdout
    assert "to calibrate: cache-correction, timestep-quantizer, quantization-correction" in text
    assert "deepcache" not in text.partition("to calibrate:")[2]


def test_one_of_several_processes_does_not_calibrate(launch: Run) -> None:
    study = launch.write(launch.folder, variants=[{"name": "row", "efficiency": CHAIN}])
    result = launch.cli("generate", study, "-o", launch.folder / "out", "--shard", "0/2")
    assert result.exit_code == 1
    (reason,) = (launch.folder / "out").glob("*/error.txt")
    first, *_ = reason.read_text().splitlines()
    assert first.startswith("deepcache is not calibrated yet")
    assert "run iec-eval calibrate" in first


def test_a_calibration_that_fails_stops_no_other_row(
    launch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, bench: Bench) -> Any:
        raise RuntimeError("no ranges today")

    monkeypatch.setattr(TimestepQuantizer, "calibrate", fail)
    rows = [{"name": "quantized", "efficiency": [QUANTIZER]}, {"name": "plain"}]
    assert launch(variants=rows).exit_code == 1
    results = read_results(launch.folder / "out" / "results.json")
    status = {row.name: (row.status, row.error) for row in results.variants}
    assert status["plain"] == ("done", None)
    assert status["quantized"][0] == "failed"
    assert "no ranges today" in (status["quantized"][1] or "")


@pytest.mark.parametrize(
    ("efficiency", "message"),
    [
        ([{**QUANTIZER, "weight_bits": 1}], "weight_bits: wanted 2 to 8 bits, or 16 to debug"),
        ([{**CACHE, "interval": 0}], "interval: .* greater than or equal to 1, got 0"),
        ([{**CACHE, "interval": 6}], "give at most 5"),
        ([{**CACHE, "cut": 5}], "cut 5 wanted, this network has 4 at most"),
        ([QUANTIZER, QUANTIZER], "are both quantizers; a run has room for one"),
        ([{"name": "cachequant", "interval": 2}, CACHE], "are both cachers"),
        ([{"name": "reconstruction"}], "put a quantizer before it"),
        ([CACHE, {"name": "quantization-correction"}], "put timestep-quantizer before it"),
    ],
)
def test_wrong_options_fail_before_weights_are_read(
    launch: Run, monkeypatch: pytest.MonkeyPatch, efficiency: list[Part], message: str
) -> None:
    def fail(self: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(UNet, "load", fail)
    result = launch(efficiency)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert result.output.startswith("iec-eval: row: ")
    assert re.search(message, result.output), result.output


# --- interruption -----------------------------------------------------------------------------

LEARNED = {"name": "reconstruction", "iterations": 25, "items": 16, "batch_size": 4}


def test_a_killed_reconstruction_goes_on_after_its_last_block(
    launch: Run, tmp_path: Path, write_study: Callable[..., Path]
) -> None:
    rows = [{"name": "row", "efficiency": [QUANTIZER, LEARNED]}]
    calibration = {"seed": 1, "images": 4}
    study = write_study(tmp_path, variants=rows, calibration=calibration)
    out = tmp_path / "out"
    with started("calibrate", study, "-o", out) as process:
        finished = killed_after_some_blocks(process, out)
    assert finished >= 2
    learned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("iec_eval.efficiency.reconstruction._Workshop._learn", spy(learned))
        assert launch([QUANTIZER, LEARNED], verb="calibrate").exit_code == 0
    resumed, _ = read_tensors(launch.artifacts["reconstruction"])
    blocks = [name for name in resumed if name.endswith(".losses")]
    assert len(learned) == len(blocks) - finished
    assert launch.artifacts.keys() == {"timestep-quantizer", "reconstruction"}  # no draft is left
    fresh = Run(launch.cli, launch.write, tmp_path / "undisturbed")
    fresh([QUANTIZER, LEARNED], verb="calibrate")
    undisturbed, _ = read_tensors(fresh.artifacts["reconstruction"])
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


def spy(learned: list[str]) -> Callable[..., Any]:
    from iec_eval.efficiency.reconstruction import _Workshop

    before = _Workshop._learn

    def learn(self: Any, block: Any, *more: Any) -> Any:
        learned.append(block.name)
        return before(self, block, *more)

    return learn


def killed_after_some_blocks(process: Any, out: Path) -> int:
    """Kill the process when the draft has two blocks; how many it has in the end."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if blocks_done(out) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    return blocks_done(out)


def blocks_done(out: Path) -> int:
    for path in (out / "artifacts").glob("*.json"):
        if json.loads(path.read_text())["part"] == "unfinished":
            tensors, _ = read_tensors(path.with_suffix(".safetensors"))
            return sum(name.endswith(".losses") for name in tensors)
    return 0


# --- callbacks that calibrate ---------------------------------------------------------------------

# A callback that measures the mean size of each step's prediction, and divides by it.
LEVELLER = """
import torch
from pydantic import Field
from iec_eval.api import BaseOptions, DenoisingCallback, hookimpl

class LevellerOptions(BaseOptions):
    factor: float = Field(1.0, description="of the result")

class Sizes(DenoisingCallback):
    name = "sizes"

    def __init__(self, total):
        super().__init__(BaseOptions())
        self.sums = torch.zeros(total)

    def refine(self, step, prediction):
        self.sums[step.index] += prediction.abs().mean()
        return prediction

class Leveller(DenoisingCallback):
    name = "leveller"
    Options = LevellerOptions
    sizes = None  # what it costs is counted before they are measured

    def calibrate(self, bench):
        sizes = Sizes(bench.clock.total)
        bench.run([sizes], batch_size=bench.images)
        return {"sizes": sizes.sums}

    def use(self, artifact):
        self.sizes = artifact["sizes"]

    def refine(self, step, prediction):
        size = 1.0 if self.sizes is None else self.sizes[step.index]
        return self.options.factor * prediction / size

@hookimpl
def iec_eval_callbacks():
    return [Leveller]
"""
LEVEL = {"name": "leveller"}


@pytest.fixture
def leveller(tmp_path: Path) -> Iterator[None]:
    place = tmp_path / "plugin"
    place.mkdir()
    with installed_plugin(place, "leveller", LEVELLER):
        yield


def levelled(launch: Run, *callbacks: Part, **changes: Any) -> Result:
    """A cached row with callbacks, launched."""
    return launch(variants=[cached_row(callbacks)], **changes)


def cached_row(callbacks: Sequence[Part]) -> dict[str, Any]:
    return {"name": "row", "efficiency": [CACHE], "callbacks": list(callbacks)}


@pytest.mark.usefixtures("leveller")
def test_a_callback_is_calibrated_once_after_the_methods_and_used(launch: Run) -> None:
    done = levelled(launch, LEVEL)
    assert done.exit_code == 0, done.output
    path = launch.artifacts["leveller"]
    sizes = read_tensors(path)[0]["sizes"]
    assert (sizes > 0).all()
    written, images = path.stat().st_mtime_ns, launch.images()
    launch.forget_images()
    assert levelled(launch, LEVEL).exit_code == 0
    assert path.stat().st_mtime_ns == written
    assert torch.equal(launch.images(), images)
    launch.forget_images()
    assert levelled(launch).exit_code == 0
    assert not torch.equal(launch.images(), images)


@pytest.mark.usefixtures("leveller")
def test_what_a_callback_measured_depends_on_all_that_comes_before_it(launch: Run) -> None:
    def key(*callbacks: Part, **changes: Any) -> str:
        shown = launch((), "--json", verb="show", variants=[cached_row(callbacks)], **changes)
        of_cache, of_leveller = json.loads(shown.stdout)["rows"][0]["artifacts"]
        assert (of_cache["part"], of_leveller["part"]) == ("deepcache", "leveller")
        return str(of_leveller["artifact"])

    plain = key(LEVEL)
    assert plain == key(LEVEL, {"name": "iec"}) == key(LEVEL, images={"seed": 9, "count": 3})
    others = [
        key({**LEVEL, "factor": 2.0}),
        key({"name": "iec"}, LEVEL),
        key(LEVEL, calibration={"images": 5}),
        key(LEVEL, sampler={"name": "ddim", "steps": 6}),
    ]
    assert len({plain, *others}) == 5


@pytest.mark.usefixtures("leveller")
def test_a_callback_that_is_not_calibrated_fails_its_row_only(launch: Run) -> None:
    rows = [{"name": "row", "callbacks": [LEVEL]}, {"name": "plain"}]
    study = launch.write(launch.folder, variants=rows, calibration={"images": 4})
    out = launch.folder / "out"
    done = launch.cli("generate", study, "-o", out, "--shard", "0/2")
    assert done.exit_code == 1
    errors = [path.read_text().splitlines()[0] for path in out.glob("*/error.txt")]
    assert len(errors) == 1
    assert errors[0].startswith("leveller is not calibrated yet")


@pytest.mark.usefixtures("leveller")
def test_calibration_settings_decide_images_of_a_row_with_such_a_callback_alone(
    launch: Run,
) -> None:
    def fingerprints(**calibration: int) -> list[str]:
        rows = [{"name": "row", "callbacks": [LEVEL]}, {"name": "plain"}]
        study = launch.write(launch.folder, variants=rows, calibration=calibration)
        shown = json.loads(launch.cli("show", study, "--json").stdout)["rows"]
        return [row["fingerprint"] for row in shown]

    first, second = fingerprints(images=4), fingerprints(images=5)
    assert first[0] != second[0]
    assert first[1] == second[1]


def test_a_calibration_without_memory_is_the_reason_that_is_told(
    cli: Cli, write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that something is not calibrated: that is what comes of it."""

    def too_large(*_: Any) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("of 80 GB 79 are taken")

    monkeypatch.setattr(TimestepQuantizer, "calibrate", too_large)
    quantized = {"name": "w8a8", "efficiency": [{"name": "timestep-quantizer"}]}
    study, out = write_study(tmp_path, variants=[{"name": "plain"}, quantized]), tmp_path / "out"
    assert cli("launch", study, "-o", out).exit_code == 1
    plain, failed = read_results(out / "results.json").variants
    assert plain.status == "done"
    assert failed.error == "OutOfMemoryError: of 80 GB 79 are taken"
