"""A study file: what it may say, and how rows inherit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from iec_eval.errors import ConfigError, IecEvalError, UnknownName
from iec_eval.study import INHERITED, Study, load, read_yaml

CACHE = {"name": "deepcache", "interval": 3}
IEC = {"name": "iec"}
CONTENT: dict[str, Any] = {
    "study": "toy",
    "model": {"name": "unet", "path": "folder"},
    "sampler": {"name": "ddim", "steps": 10},
    "images": {"seed": 3, "count": 100},
    "metrics": [{"name": "fid"}],
    "controls": [],
    "variants": [
        {"name": "plain"},
        {"name": "cached", "efficiency": [CACHE], "sampler": {"eta": 0.5, "steps": 20}},
        {"name": "cached + IEC", "extends": "cached", "callbacks": [IEC]},
    ],
    "calibration": {"seed": 1, "images": 16},
    "execution": {"batch_size": 4},
}


def study(tmp_path: Path, *overrides: str, **changes: Any) -> Study:
    """The study above with top-level keys replaced (None: left out), read from a file."""
    content = {key: value for key, value in {**CONTENT, **changes}.items() if value is not None}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load(str(path), overrides)


# --- rows -------------------------------------------------------------------------------------


def test_a_row_inherits_what_it_does_not_say(tmp_path: Path) -> None:
    plain, cached, both = study(tmp_path).experiments()
    assert (plain.efficiency, plain.callbacks) == ([], [])
    assert plain.sampler == {"name": "ddim", "steps": 10}
    assert cached.sampler == both.sampler == {"name": "ddim", "steps": 20, "eta": 0.5}
    assert both.efficiency == [CACHE]
    assert both.callbacks == [IEC]
    assert cached.callbacks == []


def test_an_extension_may_replace_and_empty_what_it_inherits(tmp_path: Path) -> None:
    more = [
        {"name": "a", "extends": "cached + IEC", "sampler": {"steps": 5}, "efficiency": []},
        {"name": "b", "extends": "a", "sampler": {"eta": 0.0}},
    ]
    *_, a, b = study(tmp_path, variants=CONTENT["variants"] + more).experiments()
    assert a.sampler == {"name": "ddim", "steps": 5, "eta": 0.5}
    assert a.callbacks == [IEC]
    assert b.sampler == {"name": "ddim", "steps": 5, "eta": 0.0}
    assert b.efficiency == []


def test_another_sampler_shares_the_steps_and_nothing_else(tmp_path: Path) -> None:
    """``spacing`` or ``eta`` of one sampler is an unknown key of most others."""
    more = [
        {"name": "a", "sampler": {"name": "plms"}},
        {"name": "b", "extends": "cached", "sampler": {"name": "plms", "steps": 7}},
        {"name": "c", "extends": "b", "sampler": {"name": "plms"}},
        {"name": "d", "sampler": {"name": "ddim", "eta": 0.1}},
    ]
    *_, a, b, c, d = study(tmp_path, variants=CONTENT["variants"] + more).experiments()
    assert a.sampler == {"name": "plms", "steps": 10}
    assert b.sampler == c.sampler == {"name": "plms", "steps": 7}
    assert d.sampler == {"name": "ddim", "steps": 10, "eta": 0.1}


def test_repeating_the_name_of_the_shared_sampler_changes_nothing(tmp_path: Path) -> None:
    more = [
        {"name": "a", "extends": "cached", "sampler": {"steps": 5}},
        {"name": "b", "extends": "cached", "sampler": {"name": "ddim", "steps": 5}},
    ]
    *_, a, b = study(tmp_path, variants=CONTENT["variants"] + more).experiments()
    assert a.sampler == b.sampler == {"name": "ddim", "steps": 5, "eta": 0.5}


def test_every_inheritable_key_is_a_key_of_a_variant() -> None:
    from iec_eval.study import Variant

    assert set(INHERITED) == set(Variant.model_fields) - {"name", "extends"}


def test_controls_come_first(tmp_path: Path) -> None:
    rows = study(tmp_path, controls=["full-precision", "full-precision+iec"]).experiments()
    assert [row.name for row in rows][:2] == ["full precision", "full precision + IEC"]
    assert [row.control for row in rows] == [True, True, False, False, False]
    assert rows[0].efficiency == rows[1].efficiency == []
    assert rows[0].callbacks == []
    assert [part["name"] for part in rows[1].callbacks] == ["iec"]


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """YAML would take the last, and rows would be gone without a word."""
    path = tmp_path / "study.yaml"
    path.write_text("study: a\nvariants:\n  - {name: x, callbacks: [], callbacks: [{name: iec}]}\n")
    with pytest.raises(ConfigError, match=r"(?s)not valid YAML.*'callbacks' twice.*line 3"):
        load(str(path))
    with pytest.raises(ConfigError, match="'count' twice"):
        study(tmp_path, "images={count: 3, count: 4}")


def test_merged_keys_may_be_replaced() -> None:
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


# --- overrides --------------------------------------------------------------------------------


def test_overrides_are_typed_as_yaml_and_reach_lists(tmp_path: Path) -> None:
    read = study(
        tmp_path,
        "images.count=7",
        "execution.devices=2",
        "variants.1.efficiency.0.interval=5",
        "variants.0.callbacks=[{name: iec, weights: [0.5, 1.0]}]",
        "calibration.seed=0x10",
        "sampler.note=a=b",
        "execution.threads=null",
    )
    assert read.images.count == 7
    assert read.execution.devices == 2
    assert read.calibration.seed == 16
    assert read.variants[1].efficiency == [{"name": "deepcache", "interval": 5}]
    assert read.variants[0].callbacks == [{"name": "iec", "weights": [0.5, 1.0]}]
    assert read.sampler["note"] == "a=b"
    assert read.execution.threads is None


def test_an_override_reaches_all_rows_that_share_what_it_changes(tmp_path: Path) -> None:
    """By an anchor: so one override turns the IEC of every row of a paper's study."""
    path = tmp_path / "study.yaml"
    rows = "- {name: a, callbacks: &c [{name: iec}]}\n- {name: b, callbacks: *c}"
    content = yaml.safe_dump({**CONTENT, "variants": []})
    path.write_text(content.replace("variants: []", f"variants:\n{rows}"))
    a, b = load(str(path), ["variants.0.callbacks.0.preset=official_ddim"]).variants
    assert a.callbacks == b.callbacks == [{"name": "iec", "preset": "official_ddim"}]


def test_overrides_make_keys_that_are_not_there_and_the_last_wins(tmp_path: Path) -> None:
    read = study(tmp_path, "execution.batch_size=3", "execution.batch_size=5", execution=None)
    assert read.execution.batch_size == 5


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("images.count", "wanted key.path=value"),
        ("=5", "wanted key.path=value"),
        ("images.count=[", "not valid YAML"),
        ("variants.3.name=x", "'3' is not one of 0..2"),
        ("variants.-1.name=x", "'-1' is not one of 0..2"),
        ("variants.x.name=y", "'x' is not one of 0..2"),
        ("study.name=x", "'name' is inside a plain value"),
        ("study.name.more=x", "'name' is inside a plain value"),
    ],
)
def test_a_wrong_override_is_quoted(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        study(tmp_path, override)
    assert repr(override) in str(caught.value)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"variant": []}, "unknown key 'variant'; did you mean 'variants'?"),
        ({"images": {"cuont": 5}}, "images.cuont"),
        ({"execution": {"batch": 5}}, "execution.batch"),
        ({"variants": [{"name": "x", "callback": []}]}, "variants.0.callback"),
        ({"images": {"count": "many"}}, "images.count.*'many'"),
        ({"images": {"count": 0}}, "images.count"),
        ({"images": {"count": 1.5}}, "images.count"),
        ({"images": {"seed": -1}}, "images.seed"),
        ({"images": {"seed": 2**63}}, "images.seed"),
        ({"execution": {"batch_size": 0}}, "execution.batch_size"),
        ({"execution": {"chunk_size": True}}, "execution.chunk_size"),
        ({"execution": {"devices": 0}}, "execution.devices"),
        ({"execution": {"devices": "two"}}, "execution.devices"),
        ({"metrics": []}, "metrics"),
        ({"metrics": None}, "'metrics' is missing"),
        ({"model": None}, "'model' is missing"),
        ({"controls": ["full"]}, "controls.0"),
        ({"variants": [{"name": ""}]}, "variants.0.name"),
        ({"variants": []}, "nothing to do"),
    ],
)
def test_a_wrong_study_names_the_file_and_the_key(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        study(tmp_path, **changes).experiments()
    assert "study" in str(caught.value)


def test_unknown_variants_are_named_with_the_nearest(tmp_path: Path) -> None:
    stray = [{"name": "cached"}, {"name": "x", "extends": "cachd"}]
    with pytest.raises(UnknownName, match="'x' extends: 'cachd'; did you mean 'cached'"):
        study(tmp_path, variants=stray).experiments()
    read = study(tmp_path, paper={"cachd": {"fid": 1.0}})
    with pytest.raises(UnknownName, match="variant in paper: 'cachd'; did you mean 'cached'"):
        read.check_remarks(["plain", "cached"])
    read = study(tmp_path, doubtful={"cachd": "why"})
    with pytest.raises(UnknownName, match="variant in doubtful: 'cachd'; did you mean 'cached'"):
        read.check_remarks(["plain", "cached"])
    read.check_remarks(["cachd"])


def test_a_doubt_has_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"doubtful\.cached: String should have at least 1"):
        study(tmp_path, doubtful={"cached": ""})
    read = study(tmp_path, doubtful={"cached": "why"}, paper={"plain": {"fid": 1.0}})
    assert read.remarks("cached") == {"paper": None, "doubt": "why"}
    assert read.remarks("plain") == {"paper": {"fid": 1.0}, "doubt": None}


def test_a_variant_extends_an_earlier_one_only(tmp_path: Path) -> None:
    for variants in (
        [{"name": "x", "extends": "x"}],
        [{"name": "x", "extends": "y"}, {"name": "y", "extends": "x"}],
    ):
        with pytest.raises(UnknownName):
            study(tmp_path, variants=variants).experiments()


def test_names_must_differ_also_from_controls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two variants are called 'x'"):
        study(tmp_path, variants=[{"name": "x"}, {"name": "x"}]).experiments()
    variants = [{"name": "full precision"}]
    with pytest.raises(ConfigError, match="two variants are called 'full precision'"):
        study(tmp_path, variants=variants, controls=["full-precision"]).experiments()


@pytest.mark.parametrize("text", ["", "- a list", "just text", "a: [", "\x00"])
def test_a_file_that_is_no_study_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(str(path))


def test_code_in_a_study_is_refused_and_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "bad.yaml", tmp_path / "proof"
    path.write_text(f"study: !!python/object/apply:os.mkdir [{proof}]")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML"):
        load(str(path))
    with pytest.raises(ConfigError, match="not valid YAML"):
        study(tmp_path, f"study=!!python/object/apply:os.mkdir [{proof}]")
    assert not proof.exists()


def test_a_file_that_is_no_text_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load(str(tmp_path / "bad.yaml"))


def test_a_missing_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(str(tmp_path / "none.yaml"))
    with pytest.raises(UnknownName, match="did you mean 'quickstart'"):
        load("quickstrat")
    with pytest.raises(IecEvalError):
        load(str(tmp_path))


def test_the_resolved_study_reads_back_as_itself(tmp_path: Path) -> None:
    read = study(tmp_path, "images.count=7")
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(read.model_dump(mode="json", exclude_defaults=True)))
    again = load(str(path))
    assert again == read
