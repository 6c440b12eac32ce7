"""What decides an image is in the fingerprint of its row, and nothing else is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from conftest import Toy
from pydantic import Field

from iec_eval.api import NOT_DECISIVE, BaseOptions, ConfigError, sha256
from iec_eval.assembly import artifact_keys
from iec_eval.efficiency.reconstruction import RATES
from iec_eval.fingerprints import digest
from iec_eval.planning import Plan
from iec_eval.plugins import Registry, load_registry
from iec_eval.samplers.ddim import DDIM
from iec_eval.study import load
from iec_eval.study_plans import plan_study

CACHE = {"name": "deepcache", "interval": 3, "cut": 2}
QUANTIZER = {"name": "timestep-quantizer"}
CONTENT: dict[str, Any] = {
    "study": "toy",
    "sampler": {"name": "ddim", "steps": 10},
    "images": {"seed": 3, "count": 100},
    "metrics": [{"name": "fid"}],
    "controls": [],
    "variants": [
        {"name": "plain"},
        {"name": "W8A8", "efficiency": [QUANTIZER], "sampler": {"eta": 0.5, "steps": 20}},
        {"name": "cached + IEC", "efficiency": [CACHE], "callbacks": [{"name": "iec"}]},
    ],
    "calibration": {"seed": 1, "images": 16},
    "execution": {"batch_size": 4},
}

Plans = Callable[..., list[Plan]]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


@pytest.fixture
def plans(toy: Toy, registry: Registry, tmp_path: Path) -> Plans:
    """Plans for the study above with overrides, and with other rows if they are given."""

    def planned(*overrides: str, variants: Rows | None = None) -> list[Plan]:
        model = {"name": "unet", "path": str(toy.folder)}
        content = {**CONTENT, "model": model} | ({"variants": variants} if variants else {})
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content))
        return plan_study(load(str(path), overrides), registry)

    return planned


def prints(plans: list[Plan]) -> list[str]:
    return [plan.fingerprint for plan in plans]


def keys(plans: list[Plan]) -> list[list[str]]:
    return [[key for _, key in artifact_keys(plan)] for plan in plans]


def known_by(plans: list[Plan]) -> tuple[list[str], list[list[str]]]:
    """Fingerprints of rows and keys of artifacts."""
    return prints(plans), keys(plans)


def one(plans: Plans, *overrides: str, **row: Any) -> str:
    (plan,) = plans(*overrides, variants=[{"name": "row", **row}])
    return plan.fingerprint


ALL, FIRST, SECOND, THIRD = (0, 1, 2), (0,), (1,), (2,)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("model.label=1", ALL),
        ("images.seed=4", ALL),
        ("sampler.steps=11", (0, 2)),  # the second has its own
        ("sampler.spacing=quad", ALL),
        ("variants.1.sampler.eta=0.25", SECOND),
        ("variants.1.efficiency.0.weight_bits=4", SECOND),
        ("variants.2.efficiency.0.interval=4", THIRD),
        ("variants.2.callbacks.0.weights=[1.0]", THIRD),
        ("variants.2.callbacks.0.preset=heun", THIRD),
        ("calibration.seed=2", (1, 2)),
        ("calibration.images=17", (1, 2)),
    ],
)
def test_what_decides_an_image_is_in_it(
    plans: Plans, override: str, changed: tuple[int, ...]
) -> None:
    before, after = prints(plans()), prints(plans(override))
    assert tuple(row for row in range(3) if before[row] != after[row]) == changed


@pytest.mark.parametrize(
    "override",
    [
        "images.count=200",
        "study=renamed",
        "variants.2.name=renamed",
        "execution.batch_size=1",
        "execution.chunk_size=1",
        "execution.devices=2",
        "execution.threads=3",
        "execution.accelerator=cpu",
        "metrics=[{name: is}]",
        "paper={plain: {fid: 1.0}}",
        "doubtful={plain: why}",
    ],
)
def test_what_does_not_decide_an_image_is_not(plans: Plans, override: str) -> None:
    assert known_by(plans()) == known_by(plans(override))


@pytest.mark.parametrize(
    "override",
    [
        "sampler.eta=0.0",
        "sampler.spacing=uniform",
        "model.guidance=1.0",
        "model.label=null",
        "variants.1.efficiency.0.weight_bits=8",
        "variants.2.callbacks.0.preset=paper",
        "variants.2.callbacks.0.weights=[0.5]",
        "variants.2.callbacks.0.corrections=1",
        "variants.2.callbacks.0.where=full",
    ],
)
def test_a_default_that_is_spelled_out_changes_nothing(plans: Plans, override: str) -> None:
    assert known_by(plans()) == known_by(plans(override))


def test_a_preset_is_what_it_stands_for(plans: Plans) -> None:
    heun = {"name": "iec", "weights": [0.5], "timestep": "next", "tolerance": None}
    named = one(plans, callbacks=[{"name": "iec", "preset": "heun"}])
    assert named == one(plans, callbacks=[heun])
    assert named != one(plans, callbacks=[{"name": "iec"}])


def test_a_preset_inside_other_options_is_what_it_stands_for(plans: Plans) -> None:
    def matched(**of: Any) -> str:
        return one(plans, callbacks=[{"name": "scale-matched", "of": of}])

    assert matched(preset="paper") == matched() == matched(weights=[0.5])
    assert matched(preset="heun") == matched(weights=[0.5], timestep="next", tolerance=None)
    assert matched(preset="heun") != matched()


@pytest.mark.parametrize("spelled", ["1/10", "2/20", "0.1", 0.1])
def test_a_share_is_a_number_however_it_is_written(plans: Plans, spelled: Any) -> None:
    def ends(share: Any) -> str:
        return one(plans, callbacks=[{"name": "iec", "where": {"ends": share}}])

    assert ends(spelled) == ends("1/10") != ends("1/8")


def test_a_composite_is_its_stages(plans: Plans) -> None:
    stages: Rows = [
        CACHE,
        {"name": "cache-correction"},
        QUANTIZER,
        {"name": "quantization-correction"},
    ]
    composite = {**CACHE, "name": "cachequant"}
    rows: Rows = [
        {"name": "a", "efficiency": [composite]},
        {"name": "b", "efficiency": stages},
        {"name": "c", "efficiency": stages[:3]},
    ]
    made = plans(variants=rows)
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    assert keys(made)[0] == keys(made)[1]


def test_a_model_is_its_files_wherever_they_are(plans: Plans, toy: Toy, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(toy.folder, moved)
    before, there = plans(), plans(f"model.path={moved}")
    assert prints(before) == prints(there)
    assert keys(before) == keys(there)
    config = moved / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.005", "0.006"))
    changed = plans(f"model.path={moved}")
    assert all(a != b for a, b in zip(prints(before), prints(changed), strict=True))
    assert keys(before)[1] != keys(changed)[1]


def test_lists_of_conditions_are_their_content(plans: Plans, tmp_path: Path) -> None:
    for name, text in (("a", "0 60\n1 60\n"), ("b", "0 60\n1 60\n"), ("c", "0 60\n2 60\n")):
        (tmp_path / name).write_text(text)
    a, b, c = (one(plans, f"model.labels={tmp_path / name}") for name in "abc")
    assert a == b
    assert len({a, c, one(plans)}) == 3


@pytest.mark.parametrize("row", range(3))
def test_a_newer_version_of_any_part_is_another_row(
    plans: Plans, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, (plan,) = prints(plans()), plans()[row : row + 1]
    for part in (plan.model, plan.sampler, *plan.parts(), *plan.callbacks):
        with monkeypatch.context() as patched:
            patched.setattr(type(part), "version", 2)
            assert prints(plans())[row] != before[row], part.name
    assert prints(plans()) == before


@pytest.mark.parametrize("row", range(3))
def test_the_content_of_files_that_parts_read_is_in_it(
    plans: Plans, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is exported again to the same path is another one."""
    before, (plan,) = known_by(plans()), plans()[row : row + 1]
    for part in (plan.sampler, *plan.parts(), *plan.callbacks):
        found = []
        for content in ("first", "second"):
            with monkeypatch.context() as patched:
                patched.setattr(type(part), "identity", lambda self, hash=content: {"net": hash})
                found.append(known_by(plans()))
        for fingerprints, artifacts in found:
            assert fingerprints[row] != before[0][row], part.name
            if artifacts[row] and part in plan.parts():
                assert artifacts[row] != before[1][row], part.name
        assert found[0][0][row] != found[1][0][row]
    assert known_by(plans()) == before


def test_a_file_that_is_not_there_is_named(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDIM, "identity", lambda self: {"net": sha256(Path("/nowhere.pt"))})
    with pytest.raises(ConfigError, match=r"ddim: FileNotFoundError: .*/nowhere.pt"):
        plans()


def test_another_default_is_another_row(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that changes a default must not pass off older images as its own."""
    before = prints(plans())

    class Changed(DDIM.Options):  # type: ignore[misc, name-defined]
        eta: float = Field(0.25, description="as before")

    monkeypatch.setattr(DDIM, "Options", Changed)
    after = prints(plans())
    assert (before[0] != after[0], before[1] == after[1]) == (True, True)


def test_the_order_of_parts_is_in_it_the_order_of_options_is_not(plans: Plans) -> None:
    parts: Rows = [{"name": "epsilon-scaling"}, {"name": "iec"}]
    assert one(plans, callbacks=parts) != one(plans, callbacks=parts[::-1])
    reverse = dict(reversed(CACHE.items()))
    assert one(plans, efficiency=[CACHE]) == one(plans, efficiency=[reverse])


def test_digests_ignore_the_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": [1]}, {"a": None}, {"b": 1}, [], [[]], ""]
    assert len({digest(value) for value in different}) == len(different)


# --- options --------------------------------------------------------------------------------


class Inner(BaseOptions):
    kept: int = 1
    place: Annotated[str, NOT_DECISIVE] = "here"


class Outer(BaseOptions):
    inner: Inner = Inner()
    several: tuple[Inner, ...] = (Inner(), Inner(kept=2))
    one_or_none: Inner | None = None
    place: Annotated[str | None, NOT_DECISIVE, Field(description="marked among others")] = None
    plain: dict[str, str]


def test_marked_options_are_left_out_however_deep() -> None:
    assert Outer(
        place="there", one_or_none=Inner(place="there"), plain={"place": "kept"}
    ).decisive() == {
        "inner": {"kept": 1},
        "several": [{"kept": 1}, {"kept": 2}],
        "one_or_none": {"kept": 1},
        "plain": {"place": "kept"},
    }


def test_rates_are_what_a_preset_of_reconstruction_stands_for(plans: Plans) -> None:
    def learned(**options: Any) -> Any:
        quantizer = {"name": "timestep-quantizer", "weight_bits": 4}
        return one(plans, efficiency=[quantizer, {"name": "reconstruction", **options}])

    named = learned(preset="church")
    names = ("rounding_rate", "scale_rate", "zero_rate", "weight_rate")
    assert named == learned(**dict(zip(names, RATES["church"], strict=True)))
    assert named == learned(preset="bedroom")  # which learns as fast
    assert named != learned(preset="imagenet")


def test_a_correction_that_judges_a_batch_is_another_where_batches_are(plans: Plans) -> None:
    """The last batch is as large as the number of images leaves it."""
    judging = [{"name": "iec", "preset": "official_ddim"}]
    known = one(plans, callbacks=judging)
    for override in ("execution.batch_size=1", "execution.chunk_size=1", "images.count=200"):
        assert one(plans, override, callbacks=judging) != known
