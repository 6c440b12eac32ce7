"""Reading original checkpoints and writing folders: what is accepted, refused, resumed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from originals import (
    CHURCH_VALUES,
    DDPM_VALUES,
    SCALE,
    SD_VALUES,
    church,
    church_state,
    ddpm_state,
    inverted,
    sd_state,
    shapes,
    write_config,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from iec_eval.conversion import convert as conversion
from iec_eval.conversion import layouts
from iec_eval.conversion.checkpoints import open_checkpoint
from iec_eval.conversion.families import FAMILIES
from iec_eval.conversion.key_maps import ddpm_unet_map
from iec_eval.conversion.layouts import layout, text_encoder
from iec_eval.conversion.original import DDPM, LatentDiffusion, read_original
from iec_eval.conversion.writing import Part, write_safetensors
from iec_eval.errors import ConfigError, CorruptFile, StorageError, UnknownName
from iec_eval.networks import build_first_stage, build_network, load_strictly
from iec_eval.options import validated
from iec_eval.storage import sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"


def church_file(folder: Path, *, ema: bool = True, **changes: Any) -> Path:
    """A latent diffusion checkpoint; ``changes`` replace tensors, None removes them."""
    state = {**church_state(ema=ema), **changes}
    path = folder / "church.ckpt"
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, path)
    return path


def convert_church(source: Path, folder: Path, **options: Any) -> str:
    config = write_config(folder, "church")
    chosen = {"family": "ldm-lsun-churches", "config": config, "visible": False, **options}
    return conversion.convert(source, folder / "out", **chosen)


def convert_ddpm(source: Path, folder: Path, **options: Any) -> str:
    config = write_config(folder, "ddpm")
    chosen = {"family": "ddpm-cifar10", "config": config, "visible": False, **options}
    return conversion.convert(source, folder / "out", **chosen)


def unet_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "out" / "unet" / WEIGHTS)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "conversion.json").read_text())
    return found


# --- what a folder is --------------------------------------------------------------------------


def test_a_folder_holds_every_component(tmp_path: Path) -> None:
    source = church_file(tmp_path)
    said = convert_church(source, tmp_path, weights="ema")
    assert "ema" in said
    assert "scheduler, unet, vae" in said
    about = record(tmp_path)
    assert about["schema"] == 1
    assert about["family"] == "ldm-lsun-churches"
    assert about["weights"] == "ema"
    assert about["source"] == {"file": "church.ckpt", "sha256": sha256(source)}
    assert about["components"].keys() == {"unet", "scheduler", "vae"}
    for component, files in about["components"].items():
        for name, digest in files.items():
            assert sha256(tmp_path / "out" / component / name) == digest
    there = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert there == {"conversion.json", "config.json", "scheduler_config.json", WEIGHTS}
    vae = json.loads((tmp_path / "out/vae/config.json").read_text())
    assert vae["scaling_factor"] == pytest.approx(SCALE)


def test_components_are_as_the_family_lays_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = replace(FAMILIES["ldm-lsun-churches"], original=church())
    monkeypatch.setattr(conversion, "FAMILIES", {family.name: family})
    source = church_file(tmp_path)
    conversion.convert(source, tmp_path / "out", family=family.name, weights="raw", visible=False)
    wanted = family.layout()
    assert wanted["vae"].pop("scaling_factor") is None
    for name, config in wanted.items():
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        found = json.loads((tmp_path / "out" / name / file).read_text())
        found.pop("scaling_factor", None)
        assert found == config


def test_networks_load_from_the_folder(tmp_path: Path) -> None:
    convert_church(church_file(tmp_path), tmp_path, weights="raw")
    for name, build in (("unet", build_network), ("vae", build_first_stage)):
        network = build(json.loads((tmp_path / f"out/{name}/config.json").read_text()))
        load_strictly(network, tmp_path / "out" / name / WEIGHTS)


def test_stock_diffusers_refuses_fixed_heads(tmp_path: Path) -> None:
    """It would build a network with other heads and say nothing."""
    from diffusers import AutoModel, UNet2DModel

    convert_church(church_file(tmp_path), tmp_path, weights="raw")
    for cls in (UNet2DModel, AutoModel):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it says
            cls.from_pretrained(tmp_path / "out" / "unet")
    config = json.loads((tmp_path / "out/unet/config.json").read_text())
    assert config["_class_name"] == "FixedHeadsUNet2DModel"


def test_types_of_numbers_stay(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in ddpm_state().items()}
    torch.save(state, tmp_path / "half.ckpt")
    convert_ddpm(tmp_path / "half.ckpt", tmp_path, weights="raw")
    assert {value.dtype for value in unet_weights(tmp_path).values()} == {torch.float16}


# --- which weights -----------------------------------------------------------------------------


def test_a_file_with_both_needs_a_choice(tmp_path: Path) -> None:
    source = church_file(tmp_path)
    with pytest.raises(ConfigError, match="--weights ema or"):
        convert_church(source, tmp_path)
    assert not (tmp_path / "out").exists()


def test_both_sets_can_be_had(tmp_path: Path) -> None:
    state = church_state()
    source = church_file(tmp_path)
    name = "model.diffusion_model.out.2.weight"
    for weights, key in (("raw", name), ("ema", "model_ema.diffusion_modelout2weight")):
        folder = tmp_path / weights
        folder.mkdir()
        convert_church(source, folder, weights=weights)
        assert torch.equal(unet_weights(folder)["conv_out.weight"], state[key])


def test_ema_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = church_file(tmp_path, ema=False)
    with pytest.raises(ConfigError, match="has no averaged weights"):
        convert_church(source, tmp_path, weights="ema")
    convert_church(source, tmp_path)
    assert record(tmp_path)["weights"] == "raw"


def test_a_file_that_does_not_say_needs_a_statement(tmp_path: Path) -> None:
    torch.save(ddpm_state(), tmp_path / "flat.ckpt")
    with pytest.raises(ConfigError, match="does not say whether its weights are averaged"):
        convert_ddpm(tmp_path / "flat.ckpt", tmp_path)
    convert_ddpm(tmp_path / "flat.ckpt", tmp_path, weights="ema")
    assert record(tmp_path)["weights"] == "ema"


def test_statements_about_published_files_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "flat.ckpt"
    torch.save(ddpm_state(), source)
    md5 = hashlib.md5(source.read_bytes()).hexdigest()
    family = replace(FAMILIES["ddpm-cifar10"], known={md5: "ema"})
    monkeypatch.setattr(conversion, "FAMILIES", {family.name: family})
    with pytest.raises(ConfigError, match="holds the ema weights"):
        convert_ddpm(source, tmp_path, weights="raw")
    convert_ddpm(source, tmp_path)
    assert record(tmp_path)["weights"] == "ema"


def test_the_published_ddpm_files_are_known() -> None:
    assert dict(FAMILIES["ddpm-cifar10"].known) == {
        "1fa350b952534ae442b1d5235cce5cd3": "ema",
        "82ed3067fd1002f5cf4c339fb80c4669": "raw",
    }


# --- structures of files -----------------------------------------------------------------------


def as_list(*, ema: bool, prefix: str = "module.") -> list[Any]:
    """What the DDIM code saves as it trains."""
    raw = {prefix + name: value for name, value in ddpm_state(1).items()}
    optimizer = {"state": {0: {"step": 7}}, "param_groups": []}
    return [raw, optimizer, 3, 1000, *([ddpm_state(2)] if ema else [])]


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_lists_of_the_ddim_code(weights: str, tmp_path: Path) -> None:
    torch.save(as_list(ema=True), tmp_path / "ckpt.pth")
    convert_ddpm(tmp_path / "ckpt.pth", tmp_path, weights=weights)
    wanted = ddpm_state(1 if weights == "raw" else 2)["conv_in.weight"]
    assert torch.equal(unet_weights(tmp_path)["conv_in.weight"], wanted)


def test_a_list_with_both_needs_a_choice(tmp_path: Path) -> None:
    torch.save(as_list(ema=True), tmp_path / "ckpt.pth")
    with pytest.raises(ConfigError, match="--weights ema or"):
        convert_ddpm(tmp_path / "ckpt.pth", tmp_path)


def test_a_list_without_average_holds_raw_weights(tmp_path: Path) -> None:
    torch.save(as_list(ema=False, prefix=""), tmp_path / "ckpt.pth")
    with pytest.raises(ConfigError, match="has no averaged weights"):
        convert_ddpm(tmp_path / "ckpt.pth", tmp_path, weights="ema")
    convert_ddpm(tmp_path / "ckpt.pth", tmp_path)
    assert record(tmp_path)["weights"] == "raw"


def save_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_wrapped(content: Any, path: Path) -> None:
    torch.save({"state_dict": OrderedDict(content), "epoch": 3}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [("a.ckpt", save_legacy), ("b.ckpt", save_wrapped), ("c.safetensors", save_file)],
)
def test_other_files_give_the_same_folder(
    name: str, save: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    for place, how in (("flat", torch.save), ("other", save)):
        (tmp_path / place).mkdir()
        source = tmp_path / place / (name if place == "other" else "flat.ckpt")
        how(ddpm_state(), source)
        convert_ddpm(source, tmp_path / place, weights="raw")
    digests = [record(tmp_path / place)["components"] for place in ("flat", "other")]
    assert digests[0] == digests[1]


@contextmanager
def lightning_module() -> Iterator[type]:
    """Lightning as old files name it, there only while a file is written."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    names.append("pytorch_lightning.callbacks.model_checkpoint")
    kept = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: ModuleType(name) for name in names})
    cls = type("ModelCheckpoint", (), {"__module__": names[-1]})
    setattr(sys.modules[names[-1]], "ModelCheckpoint", cls)  # noqa: B010
    try:
        yield cls
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def test_bookkeeping_of_lightning_is_passed_over(tmp_path: Path) -> None:
    with lightning_module() as cls:
        instance = cls()
        instance.best = 0.1
        content = {
            "state_dict": church_state(),
            "callbacks": {cls: {"best_model_score": torch.tensor(0.1)}, "instance": instance},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
            "lr_schedulers": [{"last_epoch": 3}],
            "pytorch-lightning_version": "1.4.2",
        }
        torch.save(content, tmp_path / "church.ckpt")
    before = set(sys.modules)
    convert_church(tmp_path / "church.ckpt", tmp_path, weights="raw")
    assert (tmp_path / "out" / "unet" / WEIGHTS).is_file()
    assert not [m for m in set(sys.modules) - before if "lightning" in m]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    mark = tmp_path / "was-here"
    content = {"state_dict": ddpm_state(), "callbacks": Trap(mark)}
    source = tmp_path / "evil.ckpt"
    torch.save(content, source, _use_new_zipfile_serialization=not legacy)
    with pytest.raises((ConfigError, CorruptFile), match=r"(posix|nt)\.system"):
        convert_ddpm(source, tmp_path, weights="raw")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Trap(mark)))  # the trap works
    assert mark.exists()


def test_names_that_nobody_expects_are_refused(tmp_path: Path) -> None:
    """Harmless or not: only what is known to be bookkeeping may stand in a file."""
    torch.save({"state_dict": ddpm_state(), "place": Path("a")}, tmp_path / "odd.ckpt")
    with pytest.raises(ConfigError, match=r"names pathlib\.\S*PosixPath, which could run code"):
        convert_ddpm(tmp_path / "odd.ckpt", tmp_path, weights="raw")


def test_code_that_hides_behind_lightnings_name_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-here"
    with lightning_module() as cls:
        cls.__init__ = lambda self, *given: mark.touch()  # type: ignore[misc]
        cls.__reduce__ = lambda self: (cls, ("argument",))  # type: ignore[method-assign, assignment]
        instance = cls.__new__(cls)
        torch.save({"state_dict": church_state(), "callbacks": instance}, tmp_path / "church.ckpt")
        convert_church(tmp_path / "church.ckpt", tmp_path, weights="raw")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "got 2 entries"),
        ({"state_dict": {}}, "wanted named tensors"),
        ({"weights": {"a": torch.zeros(1)}}, "got dict at 'weights'"),
        (torch.zeros(3), "got Tensor"),
    ],
)
def test_other_contents_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(CorruptFile, match=message):
        open_checkpoint(tmp_path / "odd.ckpt")


def test_what_is_no_checkpoint_is_refused_without_advice_to_trust_it(tmp_path: Path) -> None:
    """PyTorch's own is to read the file again, with whatever code is in it."""
    (tmp_path / "README.md").write_text("# A model\n")
    with pytest.raises(CorruptFile, match=r"cannot be read \(no torch file\)") as caught:
        open_checkpoint(tmp_path / "README.md")
    assert "weights_only" not in str(caught.value)
    with pytest.raises(ConfigError, match="is a folder, wanted a file"):
        open_checkpoint(tmp_path)


# --- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.diffusion_model.out.2.bias": None}, "'model.diffusion_model.out.2.bias' is miss"),
        (
            {"model.diffusion_model.out.2.bias": torch.zeros(5)},
            r"out.2.bias' has shape \(5,\), wanted \(4,\)",
        ),
        (
            {"model.diffusion_model.middle_block.1.qkv.weight": torch.zeros(100, 64, 1)},
            r"qkv.weight' has shape \(100, 64, 1\), wanted one from which \(64, 64\)",
        ),
        (
            {"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int8)},
            "out.2.bias' is torch.int8, wanted floating-point weights",
        ),
        ({"model.diffusion_model.extra.weight": torch.zeros(1)}, "unknown keys model.diffusion_mo"),
        ({"something.else": torch.zeros(1)}, "unknown keys something.else, 1 in all"),
        ({"first_stage_model.encoder.conv_in.bias": None}, "vae: key 'first_stage_model.encoder"),
        ({"scale_factor": None}, "'scale_factor' is missing"),
        ({"betas": torch.linspace(1e-4, 0.02, 1000)}, "'betas' wanted 0.0015 to 0.0155, got 0.0"),
        ({"alphas_cumprod": torch.linspace(1, 0.1, 1000)}, "noise schedule is not the conf"),
        ({"betas": torch.ones(10)}, r"'betas' has shape \(10,\), wanted \(1000,\)"),
    ],
)
def test_tensors_that_do_not_fit(changes: Any, message: str, tmp_path: Path) -> None:
    source = church_file(tmp_path, **changes)
    with pytest.raises(CorruptFile, match=message) as caught:
        convert_church(source, tmp_path, weights="raw")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value: float, tmp_path: Path) -> None:
    bias = torch.tensor([0.0, 1.0, value, 2.0])
    source = church_file(tmp_path, **{"model.diffusion_model.out.2.bias": bias})
    with pytest.raises(CorruptFile, match=r"out.2.bias' holds numbers that are not finite"):
        convert_church(source, tmp_path, weights="raw")
    assert not list((tmp_path / "out").glob("unet/*.safetensors"))


def test_missing_averaged_tensors_are_named(tmp_path: Path) -> None:
    source = church_file(tmp_path, **{"model_ema.diffusion_modelout2bias": None})
    with pytest.raises(CorruptFile, match=r"'model_ema.diffusion_modelout2bias' is missing"):
        convert_church(source, tmp_path, weights="ema")


def test_a_scale_factor_of_another_model(tmp_path: Path) -> None:
    values = {**CHURCH_VALUES, "scale_by_std": False, "scale_factor": 0.18215}
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump({"model": {"params": values}}))
    with pytest.raises(CorruptFile, match=r"'scale_factor' is 0.7306, wanted 0.18215"):
        convert_church(church_file(tmp_path), tmp_path, weights="raw", config=config)


@pytest.mark.parametrize("kept", [0.3, 0.99])
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_files_that_were_cut_short(name: str, kept: float, tmp_path: Path) -> None:
    source = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(ddpm_state(), source)
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CorruptFile, match=str(source)):
        convert_ddpm(source, tmp_path, weights="raw")
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        convert_ddpm(tmp_path / "none.ckpt", tmp_path, weights="raw")
    with pytest.raises(UnknownName, match="did you mean 'ddpm-cifar10'"):
        conversion.convert(tmp_path / "none.ckpt", tmp_path / "out", family="ddpm-cifar")


# --- configurations ----------------------------------------------------------------------------


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A deep copy with the entry at a dotted path replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(values))
    *above, last = path.split(".")
    inner = copy
    for step in above:
        inner = inner[step]
    inner[last] = value
    return copy


UNET = "unet_config.params"
FIRST = "first_stage_config.params"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{UNET}.use_new_attention_order", True, "use_new_attention_order"),
        (f"{UNET}.dims", 3, "unet_config.params.dims"),
        (f"{UNET}.num_classes", 10, "unet_config.params.num_classes"),
        (f"{UNET}.conv_resample", False, "unet_config.params.conv_resample"),
        (f"{UNET}.channel_mult", [2, 2], "channel_mult must begin with 1"),
        (f"{UNET}.num_heads", 5, "num_heads 5 does not divide"),
        (f"{UNET}.num_heads", -1, "num_heads or num_head_channels"),
        (f"{UNET}.model_channels", 40, "unet_config.params.model_channels"),
        (f"{UNET}.use_linear_in_transformer", True, "use_linear_in_transformer"),
        (f"{UNET}.use_spatial_transformer", True, "without context_dim"),
        (f"{UNET}.context_dim", 3, "context_dim needs use_spatial_transformer"),
        (f"{UNET}.in_channels", 3, "must be equal"),
        (f"{FIRST}.ddconfig.attn_resolutions", [16], "attn_resolutions"),
        (f"{FIRST}.ddconfig.attn_type", "linear", "attn_type"),
        (f"{FIRST}.ddconfig.double_z", False, "double_z must be true"),
        (f"{FIRST}.ddconfig.z_channels", 8, "embed_dim other than z_channels"),
        (f"{FIRST}.n_embed", 64, "n_embed must be given"),
        ("first_stage_config.target", "ldm.models.autoencoder.IdentityFirstStage", "target"),
        ("cond_stage_config", {"target": "x.Bert", "params": {}}, "cond_stage_config"),
        ("parameterization", "x0", "parameterization"),
        ("beta_schedule", "cosine", "beta_schedule"),
        ("conditioning_key", "concat", "conditioning_key"),
    ],
)
def test_unsupported_values_are_refused_by_name(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"params": changed(CHURCH_VALUES, path, value)}}))
    with pytest.raises(ConfigError, match=message) as caught:
        read_original(config, LatentDiffusion)
    assert str(config) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.resamp_with_conv", False, "resamp_with_conv"),
        ("model.type", "bayesian", "model.type"),
        ("model.conditional", True, "conditional"),
        ("model.ch_mult", [2], "ch_mult must begin with 1"),
        ("model.out_ch", 6, "out_ch 6 must equal"),
        ("data.channels", 1, "data.channels"),
        ("data.rescaled", False, "data.rescaled"),
        ("diffusion.beta_schedule", "jsd", "beta_schedule"),
    ],
)
def test_unsupported_ddpm_values_are_refused_by_name(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(changed(DDPM_VALUES, path, value)))
    with pytest.raises(ConfigError, match=message):
        read_original(config, DDPM)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {params: 3}", "wanted the key model.params"),
        ("- 1", "wanted the key model.params"),
        ("model: {target: ldm.models.diffusion.ddpm.DDPM, params: {}}", "wanted a LatentDiffusion"),
        ("a: [", "cannot be read"),
    ],
)
def test_other_files_are_no_configurations(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_original(tmp_path / "a.yaml", LatentDiffusion)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_original(tmp_path / "none.yaml", LatentDiffusion)


# --- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "Transformer2DModel"}, "wanted _class_name UNet2DModel"),
        ({"_class_name": "FixedHeadsUNet2DModel"}, "needs num_attention_heads"),
        ({"_class_name": "UNet2DModel", "colour": 1}, "unknown keys colour"),
        ({"_class_name": "UNet2DModel", "down_block_types": ["X"]}, "describes no UNet2DModel"),
        ({"_class_name": "UNet2DModel", "num_attention_heads": 5}, "does not divide the"),
        ({"_class_name": "UNet2DModel", "num_attention_heads": "8"}, "'8' does not divide"),
    ],
)
def test_networks_that_are_not_understood(config: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build_network(config)


def test_first_stages_that_are_not_understood() -> None:
    with pytest.raises(ConfigError, match="wanted _class_name AutoencoderKL or VQModel, got None"):
        build_first_stage({})


def test_heads_are_fixed_everywhere() -> None:
    from diffusers.models.attention_processor import Attention

    with torch.device("meta"):
        network = build_network(FAMILIES["ldm-lsun-churches"].layout()["unet"])
    found = {(m.heads, m.inner_dim) for m in network.modules() if isinstance(m, Attention)}
    assert found == {(8, 192), (8, 384), (8, 768)}
    scales = {m.inner_dim: m.scale for m in network.modules() if isinstance(m, Attention)}
    assert scales == {192: 24**-0.5, 384: 48**-0.5, 768: 96**-0.5}


# --- the tokenizer -----------------------------------------------------------------------------


def test_a_model_without_text_takes_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads no text"):
        convert_church(church_file(tmp_path), tmp_path, weights="raw", tokenizer=tmp_path)


@pytest.fixture
def stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Converts a tiny Stable Diffusion: the whole file, but with a smaller text encoder."""
    tiny = {"num_hidden_layers": 1, "vocab_size": 20, "intermediate_size": 8}
    monkeypatch.setattr(layouts, "text_encoder", lambda: {**text_encoder(), **tiny})
    config = tmp_path / "sd.yaml"
    config.write_text(yaml.safe_dump({"model": {"params": SD_VALUES}}))
    torch.save({"state_dict": sd_state({**text_encoder(), **tiny})}, tmp_path / "sd.ckpt")

    def run(**options: Any) -> str:
        chosen = {"family": "stable-diffusion-v1", "visible": False, "config": config, **options}
        return conversion.convert(tmp_path / "sd.ckpt", tmp_path / "out", **chosen)

    return run


def test_stable_diffusion_loads_as_its_libraries_load_it(
    stable_diffusion: Callable[..., str], tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    stable_diffusion()
    state = torch.load(tmp_path / "sd.ckpt", weights_only=True)["state_dict"]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert torch.equal(unet.conv_out.bias, state["model.diffusion_model.out.2.bias"])
    vae = AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")
    assert vae.config.scaling_factor == 0.18215
    assert DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler").config.steps_offset == 1
    transformers = pytest.importorskip("transformers")
    text = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    table = state["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    assert torch.equal(text.get_input_embeddings().weight, table)


def test_the_tokenizer_is_copied(stable_diffusion: Callable[..., str], tmp_path: Path) -> None:
    assert "vocab.json and merges.txt of openai/clip-vit-large-patch14" in stable_diffusion()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"merges.txt not found"):
        stable_diffusion(tokenizer=folder)
    (folder / "merges.txt").write_text("a b")
    (folder / "README.md").write_text("no")
    assert "--tokenizer" not in stable_diffusion(tokenizer=folder)
    assert {p.name for p in (tmp_path / "out/tokenizer").iterdir()} == {"vocab.json", "merges.txt"}
    assert "--tokenizer" not in stable_diffusion()  # it is there now


# --- writing -----------------------------------------------------------------------------------


def test_written_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3).half(),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "strided": torch.randn(4, 6).t(),
        "bfloat": torch.randn(2, 2).bfloat16(),
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(5),
        "eight": torch.randn(7).to(torch.float8_e4m3fn),
    }
    parts = {k: Part(v.dtype, tuple(v.shape), lambda v=v: v) for k, v in tensors.items()}
    path, written = tmp_path / "a.safetensors", list[int]()
    digest = write_safetensors(path, parts, written.append)
    assert digest == sha256(path)
    assert sum(written) == sum(v.numel() * v.element_size() for v in tensors.values())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == tensors.keys()
        for name, value in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == value.dtype
            assert torch.equal(found.to(torch.float64), value.to(torch.float64))
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, value in tensors.items():  # readers map tensors in place, which wants them aligned
        assert (start + header[name]["data_offsets"][0]) % value.element_size() == 0


def test_types_that_the_format_lacks_are_refused(tmp_path: Path) -> None:
    part = Part(torch.complex64, (1,), lambda: torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(CorruptFile, match=r"'z' is torch.complex64"):
        write_safetensors(tmp_path / "a.safetensors", {"z": part}, lambda written: None)
    assert list(tmp_path.iterdir()) == []


# --- resuming ----------------------------------------------------------------------------------


def times(folder: Path) -> dict[str, int]:
    files = (folder / "out").rglob("*.safetensors")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    source = church_file(tmp_path)
    convert_church(source, tmp_path, weights="ema")
    before = times(tmp_path)
    convert_church(source.rename(tmp_path / "renamed.ckpt"), tmp_path, weights="ema")
    assert times(tmp_path) == before


def test_a_damaged_component_alone_is_made_again(tmp_path: Path) -> None:
    source = church_file(tmp_path)
    convert_church(source, tmp_path, weights="ema")
    before, wanted = times(tmp_path), sha256(tmp_path / "out/vae" / WEIGHTS)
    (tmp_path / "out/vae" / WEIGHTS).write_bytes(b"damaged")
    convert_church(source, tmp_path, weights="ema")
    after = times(tmp_path)
    assert sha256(tmp_path / "out/vae" / WEIGHTS) == wanted
    assert [name for name in after if after[name] != before[name]] == [f"out/vae/{WEIGHTS}"]


def test_a_folder_of_another_conversion_is_refused(tmp_path: Path) -> None:
    source = church_file(tmp_path)
    convert_church(source, tmp_path, weights="ema")
    with pytest.raises(ConfigError, match=r"holds another conversion \(weights differ"):
        convert_church(source, tmp_path, weights="raw")
    other = church_file(tmp_path, logvar=torch.ones(1000))
    with pytest.raises(ConfigError, match=r"holds another conversion \(source differ"):
        convert_church(other, tmp_path, weights="ema")


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    source = church_file(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all I have")
    with pytest.raises(ConfigError, match="holds something else"):
        convert_church(source, tmp_path, weights="ema")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    for text in ("{", "[]", '{"components": {"unet": 3}}'):
        (tmp_path / "out" / "conversion.json").write_text(text)
        with pytest.raises(CorruptFile, match="is no record of a conversion"):
            convert_church(source, tmp_path, weights="ema")


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    source = church_file(tmp_path)
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match="it is not a folder"):
        convert_church(source, tmp_path, weights="ema")


def test_a_kill_leaves_no_half_file(tmp_path: Path) -> None:
    """Killed while the second component is written: it is not there, the first stays."""
    source, config = church_file(tmp_path), write_config(tmp_path, "church")
    script = f"""
        import os, signal
        from pathlib import Path
        from iec_eval.conversion import convert as module
        write = module.write_safetensors
        def deadly(path, parts, on_written):
            if path.parent.name == "vae":
                on_written = lambda written: os.kill(os.getpid(), signal.SIGKILL)
            return write(path, parts, on_written)
        module.write_safetensors = deadly
        module.convert(Path({str(source)!r}), Path({str(tmp_path / "out")!r}), weights="ema",
                       family="ldm-lsun-churches", config=Path({str(config)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out/vae" / WEIGHTS).exists()
    assert list((tmp_path / "out/vae").glob("*.tmp"))  # what it was writing
    before = times(tmp_path)
    assert list(before) == [f"out/unet/{WEIGHTS}"]
    convert_church(source, tmp_path, weights="ema")
    assert times(tmp_path) | before == times(tmp_path)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert record(tmp_path)["components"].keys() == {"unet", "scheduler", "vae"}


# --- memory ------------------------------------------------------------------------------------

BIG = changed(changed(DDPM_VALUES, "model.ch", 224), "model.ch_mult", [1, 2, 2, 2])
BIG = changed(changed(BIG, "model.num_res_blocks", 2), "data.image_size", 32)
WATCHED = """
    import sys, threading
    from pathlib import Path
    from iec_eval.conversion.convert import convert
    import diffusers
    diffusers.UNet2DModel, diffusers.AutoencoderKL  # imported now, not while it is watched
    def own():  # memory that is not pages of a file
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    peak, stop = [own()], threading.Event()
    def watch():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], own())
    before = own()
    watcher = threading.Thread(target=watch); watcher.start()
    convert(Path(sys.argv[1]), Path(sys.argv[2]), family="ddpm-cifar10", weights="raw",
            config=Path(sys.argv[3]))
    stop.set(); watcher.join()
    print((peak[0] - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_memory_stays_far_below_the_file(suffix: str, tmp_path: Path) -> None:
    original = validated(DDPM, BIG, "big")
    with torch.device("meta"):
        sizes = shapes(build_network(layout(original)["unet"]))
    state = inverted(ddpm_unet_map(original), sizes)
    source, config = tmp_path / f"big.{suffix}", tmp_path / "big.yml"
    (torch.save if suffix == "ckpt" else save_file)(
        {k: v.contiguous() for k, v in state.items()}, source
    )
    config.write_text(yaml.safe_dump(BIG))
    assert source.stat().st_size > 400e6
    script = [sys.executable, "-c", textwrap.dedent(WATCHED)]
    done = subprocess.run(
        [*script, source, tmp_path / "out", config], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100e6
