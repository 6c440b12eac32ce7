"""Converted weights compute what the originals computed; sizes are the published ones."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.loaders import single_file_utils
from helpers import oracle, original_to_diffusers
from originals import inverted, shapes
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.clock import Clock
from iec_eval.conversion.components import ema_name
from iec_eval.conversion.families import FAMILIES
from iec_eval.conversion.key_maps import (
    KeyMap,
    ddpm_unet_map,
    first_stage_map,
    latent_unet_map,
    text_encoder_shapes,
)
from iec_eval.conversion.layouts import (
    ddpm_unet,
    first_stage,
    latent_unet,
    layout,
    text_encoder,
)
from iec_eval.conversion.original import (
    DDPM,
    FirstStageConfig,
    FirstStageParams,
    LatentDiffusion,
    UNetParams,
)
from iec_eval.conversion.writing import Part, write_safetensors
from iec_eval.efficiency.deepcache import CachedUNet
from iec_eval.networks import build_first_stage, build_network, load_strictly
from iec_eval.options import validated
from iec_eval.schedule import NoiseSchedule

LATENT = ("church", "bedroom", "cin256", "sd")
FIRST_STAGES = {"kl": "AutoencoderKL", "vq": "VQModelInterface"}


def converted(network: nn.Module, origins: KeyMap, state: dict[str, Tensor]) -> Any:
    """The network with all of ``state``, which it must use up."""
    wanted = network.state_dict()
    assert {origins[name].name for name in wanted} == state.keys()
    taken = {name: origins[name].take(state[origins[name].name]) for name in wanted}
    network.load_state_dict(taken)
    return network.eval().requires_grad_(False)


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[5:]: value for key, value in tensors.items() if key.startswith("ckpt/")}


def assert_recorded(found: Tensor, wanted: Tensor, about: dict[str, Any]) -> None:
    torch.testing.assert_close(found, wanted, atol=about["tolerance"]["abs"], rtol=0)


@cache
def latent(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    tensors, about = oracle(f"ldm_unet_{name}")
    params = validated(UNetParams, about["config"]["unet_config"], name)
    network = build_network(latent_unet(params, params.image_size))
    return converted(network, latent_unet_map(params), weights_of(tensors)), tensors, about


@cache
def autoencoder(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    tensors, about = oracle(f"first_stage_{name}")
    config = FirstStageConfig.model_validate(
        {"target": f"ldm.models.autoencoder.{FIRST_STAGES[name]}", "params": about["config"]}
    )
    network = build_first_stage(first_stage(config, 0.23))
    origins = first_stage_map(config.params.ddconfig)
    return converted(network, origins, weights_of(tensors)), tensors, about


def ddpm_original(config: dict[str, Any]) -> DDPM:
    """The oracle's configuration as the DDIM code's YAML has it."""
    names = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions")
    values = {
        "model": {name: config[name] for name in names},
        "data": {"image_size": config["resolution"]},
    }
    return validated(DDPM, values, "ddpm")


# --- recorded outputs of the original code ----------------------------------------------------


def test_ddpm_network_predicts_as_recorded() -> None:
    tensors, about = oracle("ddpm_unet")
    original, state = ddpm_original(about["config"]), weights_of(tensors)
    network = converted(build_network(ddpm_unet(original)), ddpm_unet_map(original), state)
    x = tensors["in/x"]
    for timestep, wanted in zip(tensors["in/t"], tensors["out/eps"], strict=True):
        assert_recorded(network(x, timestep.expand(len(x))).sample, wanted, about)
    assert_recorded(network(x, tensors["in/t_mixed"]).sample, tensors["out/eps_mixed"], about)


def test_ddpm_map_agrees_with_the_one_of_the_tests() -> None:
    tensors, about = oracle("ddpm_unet")
    original, state = ddpm_original(about["config"]), weights_of(tensors)
    network = converted(build_network(ddpm_unet(original)), ddpm_unet_map(original), state)
    wanted = original_to_diffusers(state, len(about["config"]["ch_mult"]))
    for name, value in network.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("name", LATENT)
def test_latent_network_predicts_as_recorded(name: str) -> None:
    network, tensors, about = latent(name)
    x, inputs = tensors["in/x"], context(tensors)
    for timestep, wanted in zip(tensors["in/t"], tensors["out/eps"], strict=True):
        assert_recorded(network(x, timestep.expand(len(x)), **inputs).sample, wanted, about)


@pytest.mark.parametrize("name", LATENT)
def test_latent_network_is_cached_as_recorded(name: str) -> None:
    network, tensors, about = latent(name)
    clock = Clock(2, [0])
    cached, inputs = CachedUNet(network, 1, clock), context(tensors)

    def run(sample: str, timestep: str) -> Tensor:
        x = tensors[f"in/cache/{sample}"]
        output: Tensor = cached(x, tensors[f"in/cache/{timestep}"].expand(len(x)), **inputs)
        return output

    assert_recorded(run("x_full", "t_full"), tensors["out/cache/eps_full"], about)
    assert cached.feature is not None
    assert_recorded(cached.feature, tensors["out/cache/F"], about)
    clock.full = False
    assert_recorded(run("x", "t"), tensors["out/cache/eps"], about)
    cached.correction = Affine(tensors["in/affine/a"], tensors["in/affine/b"])
    assert_recorded(run("x", "t"), tensors["out/affine/eps"], about)


class Affine(nn.Module):
    """``a x + b`` for each channel."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = a.view(-1, 1, 1), b.view(-1, 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.a * feature + self.b


def context(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = tensors.get("in/context")
    return {} if found is None else {"encoder_hidden_states": found}


def test_heads_matter() -> None:
    """Heads grouped otherwise, or another number of them, is another network."""
    network, tensors, about = latent("church")
    x, timestep = tensors["in/x"], tensors["in/t"][0]
    attention = network.mid_block.attentions[0]
    heads, attention.heads = attention.heads, 1
    try:
        apart = network(x, timestep.expand(len(x))).sample - tensors["out/eps"][0]
    finally:
        attention.heads = heads
    assert apart.abs().max() > 10 * about["tolerance"]["abs"]


def test_kl_autoencoder_computes_as_recorded() -> None:
    network, tensors, about = autoencoder("kl")
    decode = network.decode(tensors["in/z"]).sample
    assert_recorded(decode, tensors["out/decode"], about)
    scaled = network.decode(tensors["in/z"] / network.config.scaling_factor).sample
    assert_recorded(scaled, tensors["out/decode_first_stage_scaled"], about)
    posterior = network.encode(tensors["in/image"]).latent_dist
    assert_recorded(posterior.mean, tensors["out/moments_mean"], about)
    assert_recorded(posterior.logvar, tensors["out/moments_logvar"], about)


def test_vq_autoencoder_computes_as_recorded() -> None:
    network, tensors, about = autoencoder("vq")
    z = tensors["in/z"]
    assert_recorded(network.decode(z).sample, tensors["out/decode"], about)
    plain = network.decode(z, force_not_quantize=True).sample
    assert_recorded(plain, tensors["out/decode_not_quantized"], about)
    snapped, _, (_, _, indices) = network.quantize(z)
    assert_recorded(snapped, tensors["out/z_q"], about)
    assert torch.equal(indices.view(tensors["out/indices"].shape), tensors["out/indices"])
    assert_recorded(
        network.encode(tensors["in/image"]).latents, tensors["out/encode_prequant"], about
    )


# --- whole files, through the command line -----------------------------------------------------


def oracle_file(name: str) -> Path:
    oracle(name)  # skips where there are none
    return Path(os.environ["IEC_EVAL_ORACLES"]) / f"{name}.ckpt"


def latent_yaml(folder: Path) -> Path:
    """The configuration of the whole recorded file, as it would have been published."""
    config = oracle("ldm_ckpt")[1]["config"]
    sizes = config["cond_stage"]
    params = {
        "linear_start": config["betas"]["start"],
        "linear_end": config["betas"]["end"],
        "image_size": 8,
        "channels": 3,
        "conditioning_key": "crossattn",
        "scale_by_std": True,
        "unet_config": {"params": config["unet_config"]},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.VQModelInterface",
            "params": config["first_stage_config"],
        },
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {**sizes, "key": "class_label"},
        },
    }
    path = folder / "ldm.yaml"
    path.write_text(yaml.safe_dump({"model": {"params": params}}))
    return path


def read_component(folder: Path, build: Any) -> Any:
    network = build(json.loads((folder / "config.json").read_text()))
    load_strictly(network, folder / "diffusion_pytorch_model.safetensors")
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_latent_checkpoint_end_to_end(weights: str, tmp_path: Path, cli: Any) -> None:
    tensors, about = oracle("ldm_ckpt")
    options = ["--config", latent_yaml(tmp_path), "--weights", weights]
    done = cli(
        "convert", oracle_file("ldm_ckpt"), tmp_path / "out", "--family", "ldm-imagenet", *options
    )
    assert done.exit_code == 0, done.output
    unet = read_component(tmp_path / "out" / "unet", build_network)
    table = load_file(tmp_path / "out/class_embedder/diffusion_pytorch_model.safetensors")["weight"]
    states = table[tensors["in/class_ids"]][:, None]
    assert torch.equal(states, tensors["out/context"])
    x = tensors["in/x"]
    for timestep, wanted in zip(tensors["in/t"], tensors[f"out/eps_{weights}"], strict=True):
        found = unet(x, timestep.expand(len(x)), encoder_hidden_states=states).sample
        assert_recorded(found, wanted, about)
    first = read_component(tmp_path / "out" / "vqvae", build_first_stage)
    assert first.config.scaling_factor == pytest.approx(about["config"]["scale_factor"], rel=1e-6)
    images = first.decode(tensors["in/z"] / first.config.scaling_factor).sample
    assert_recorded(images, tensors["out/decode_first_stage"], about)


def test_ddpm_checkpoint_end_to_end(tmp_path: Path, cli: Any) -> None:
    tensors, about = oracle("ddpm_ckpt")
    original = ddpm_original(about["config"])
    config = tmp_path / "ddpm.yml"
    config.write_text(yaml.safe_dump(original.model_dump(mode="json")))
    source = oracle_file("ddpm_ckpt")
    options = ["--family", "ddpm-cifar10", "--config", config, "--weights", "ema"]
    done = cli("convert", source, tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    network = read_component(tmp_path / "out" / "unet", build_network)
    x = tensors["in/x"]
    for timestep, wanted in zip(tensors["in/t"], tensors["out/eps"], strict=True):
        assert_recorded(network(x, timestep.expand(len(x))).sample, wanted, about)
    assert json.loads((tmp_path / "out/conversion.json").read_text())["weights"] == "ema"


def test_help_names_the_families(cli: Any) -> None:
    text = "".join(cli("convert", "--help").output.split())  # lines end inside names
    assert all(name in text for name in FAMILIES)


def test_a_mistake_is_one_message(tmp_path: Path, cli: Any) -> None:
    done = cli("convert", tmp_path / "none.ckpt", tmp_path / "out", "--family", "ddpm-cifar10")
    assert done.exit_code == 2
    assert done.output == f"iec-eval: checkpoint {tmp_path / 'none.ckpt'}: no such file\n"


# --- diffusers' own conversion, where it is right ----------------------------------------------


def sd_params() -> UNetParams:
    values = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "use_spatial_transformer": True,
        "context_dim": 768,
    }
    return validated(UNetParams, values, "sd")


def test_unet_of_stable_diffusion_as_diffusers_converts_it() -> None:
    params = sd_params()
    config, origins = latent_unet(params, 8), latent_unet_map(params)
    network = build_network(config)
    state = inverted(origins, shapes(network))
    found = converted(network, origins, state).state_dict()
    prefixed = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    theirs = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    wanted = single_file_utils.convert_ldm_unet_checkpoint(prefixed, theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_kl_autoencoder_as_diffusers_converts_it() -> None:
    config = FirstStageConfig(target="ldm.models.autoencoder.AutoencoderKL", params=kl_params())
    network = build_first_stage(first_stage(config, 0.18215))
    origins = first_stage_map(config.params.ddconfig)
    state = inverted(origins, shapes(network))
    found = converted(network, origins, state).state_dict()
    prefixed = {f"first_stage_model.{name}": value for name, value in state.items()}
    theirs = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    wanted = single_file_utils.convert_ldm_vae_checkpoint(prefixed, theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].view_as(found[name])) for name in found)


def kl_params() -> FirstStageParams:
    values = {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 64,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 2, 2, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
        },
    }
    return validated(FirstStageParams, values, "kl")


def test_text_encoder_is_what_transformers_builds(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    config = {**text_encoder(), **tiny, "num_attention_heads": 2}
    state = {name: torch.randn(shape) for name, shape in text_encoder_shapes(config).items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = {k: Part(v.dtype, tuple(v.shape), lambda v=v: v) for k, v in state.items()}
    write_safetensors(tmp_path / "model.safetensors", parts, lambda written: None)
    model, report = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded = {name.removeprefix("text_model."): v for name, v in model.state_dict().items()}
    loaded.pop("embeddings.position_ids", None)
    assert loaded.keys() == {name.removeprefix("text_model.") for name in state}
    assert all(torch.equal(v, state[f"text_model.{name}"]) for name, v in loaded.items())


def test_text_encoder_has_the_published_size() -> None:
    shapes_of = text_encoder_shapes(text_encoder()).values()
    assert sum(torch.Size(shape).numel() for shape in shapes_of) == 123_060_480


# --- the published sizes -----------------------------------------------------------------------

PUBLISHED = {  # parameters in millions, multiply-accumulates of a full and a cached evaluation in G
    "ddpm-cifar10": (35.7, 6.22, 4, 3.38),
    "ldm-lsun-churches": (294.0, 20.8, 1, 1.66),  # Rombach et al. 2022, table 12: 294 M
    "ldm-lsun-bedrooms": (274.0, 101.2, 1, 6.01),
    "ldm-imagenet": (401.0, 104.2, 1, 4.42),
    "stable-diffusion-v1": (860.0, 401.6, 1, 31.6),
}
FIRST_STAGE_MILLIONS = {"vae": 83.65, "vqvae": 55.3}  # as published


@cache
def true_size(name: str) -> Any:
    with torch.device("meta"):
        return build_network(FAMILIES[name].layout()["unet"]).eval()


def gigamacs(network: Any, name: str) -> float:
    configs = FAMILIES[name].layout()
    sizes, inputs = configs["unet"], {}
    if "cross_attention_dim" in sizes:
        length = 77 if "text_encoder" in configs else 1
        states = torch.empty(1, length, sizes["cross_attention_dim"], device="meta")
        inputs["encoder_hidden_states"] = states
    side = sizes["sample_size"]
    sample = torch.empty(1, sizes["in_channels"], side, side, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(sample, torch.zeros(1, device="meta"), **inputs)
    return counter.get_total_flops() / 2e9


def test_every_family_is_published() -> None:
    assert FAMILIES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_families_have_the_published_sizes(name: str) -> None:
    parameters, full, cut, cached = PUBLISHED[name]
    network = true_size(name)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(parameters, rel=0.02)
    assert gigamacs(network, name) == pytest.approx(full, rel=0.02)
    clock = Clock(2, [0])
    caching = CachedUNet(network, cut, clock)
    gigamacs(caching, name)
    clock.full = False
    assert gigamacs(caching, name) == pytest.approx(cached, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_families_have_the_published_first_stages(name: str) -> None:
    configs = FAMILIES[name].layout()
    for kind in configs.keys() & FIRST_STAGE_MILLIONS.keys():
        with torch.device("meta"):
            network = build_first_stage(configs[kind])
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count / 1e6 == pytest.approx(FIRST_STAGE_MILLIONS[kind], rel=1e-3)
    assert bool(configs.keys() & FIRST_STAGE_MILLIONS.keys()) == (name != "ddpm-cifar10")


def test_components_of_the_families() -> None:
    scales = {
        name: next((c["scaling_factor"] for c in f.layout().values() if "scaling_factor" in c), 0)
        for name, f in FAMILIES.items()
    }
    assert scales == {
        "ddpm-cifar10": 0,
        "ldm-lsun-churches": None,  # in the checkpoint
        "ldm-lsun-bedrooms": 1.0,
        "ldm-imagenet": 1.0,
        "stable-diffusion-v1": 0.18215,
    }
    classes = FAMILIES["ldm-imagenet"].layout()["class_embedder"]
    assert classes == {"num_embeddings": 1001, "dim": 512}
    assert "text_encoder" in FAMILIES["stable-diffusion-v1"].layout()


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_of_averaged_weights_are_unique(name: str) -> None:
    """Latent diffusion drops the dots of names; no two tensors may fall together."""
    original = FAMILIES[name].original
    if not isinstance(original, LatentDiffusion):
        return
    origins = latent_unet_map(original.unet_config.params)
    names = {origins[new].name for new in true_size(name).state_dict()}
    assert len({ema_name(old) for old in names}) == len(names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedules_of_the_families(name: str) -> None:
    """diffusers' scheduler has our noise schedule, and ends as each original sampler does."""
    from diffusers import DDIMScheduler

    config = FAMILIES[name].layout()["scheduler"]
    scheduler = DDIMScheduler.from_config(config)
    ends = {
        "ddpm-cifar10": ("linear", 1e-4, 0.02),
        "ldm-lsun-churches": ("scaled_linear", 0.0015, 0.0155),
        "ldm-lsun-bedrooms": ("scaled_linear", 0.0015, 0.0195),
        "ldm-imagenet": ("scaled_linear", 0.0015, 0.0195),
        "stable-diffusion-v1": ("scaled_linear", 0.00085, 0.012),
    }
    wanted = NoiseSchedule.from_betas(*ends[name])
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), wanted.alphas_cumprod, rtol=2e-4, atol=0
    )
    last = 1.0 if name == "ddpm-cifar10" else float(scheduler.alphas_cumprod[0])
    assert float(scheduler.final_alpha_cumprod) == last
    scheduler.set_timesteps(100)
    assert int(scheduler.timesteps[-1]) == (0 if name == "ddpm-cifar10" else 1)
    assert not scheduler.config.clip_sample


def test_layout_is_json() -> None:
    for family in FAMILIES.values():
        assert json.loads(json.dumps(layout(family.original))) == family.layout()
