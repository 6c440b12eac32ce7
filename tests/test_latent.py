"""Latent models: conditions by index, guidance, decoding; the published ones without files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import started
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from helpers import build
from safetensors.torch import load_file, save_file
from standins import LATENT, LATENT_MODELS, PROMPTS, PUBLISHED, STATES

from iec_eval.calibration import Bench
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser
from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.models.base import to_uint8
from iec_eval.models.hooks import iec_eval_models
from iec_eval.models.latent import ImageNet, LatentDiffusion, LSUNBedrooms, StableDiffusion
from iec_eval.samplers.ddim import DDIM
from iec_eval.storage import read_tensors
from iec_eval.testing import check_model

CLASSES = {cls.name: cls for cls in iec_eval_models()}
Cli = Callable[..., Result]


def options(standins: dict[str, Path], name: str, **more: Any) -> dict[str, Any]:
    told = {"prompts": str(standins["prompts"])} if name == "stable-diffusion-v1" else {}
    return {"path": str(standins[name]), **told, **more}


def model(standins: dict[str, Path], name: str, **more: Any) -> Any:
    return build(CLASSES[name], options(standins, name, **more))


@pytest.fixture
def changed(standins: dict[str, Path], tmp_path: Path) -> Callable[[str], dict[str, Path]]:
    """A copy of one folder, to be changed."""

    def copy(name: str) -> dict[str, Path]:
        shutil.copytree(standins[name], tmp_path / name)
        return {**standins, name: tmp_path / name}

    return copy


# --- the contract -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_model_keeps_the_contract(standins: dict[str, Path], name: str) -> None:
    check_model(CLASSES[name], options(standins, name))


@pytest.mark.parametrize("name", LATENT_MODELS)
def test_the_general_model_reads_the_same_folder(standins: dict[str, Path], name: str) -> None:
    published = model(standins, name)
    chosen = {k: v for k, v in published.options.model_dump().items() if v is not None}
    general = build(LatentDiffusion, chosen)
    sample = torch.randn(2, *published.shape)
    found = [_predict(one, sample) for one in (published, general)]
    assert torch.equal(*found)
    assert torch.equal(*(one.decode(sample) for one in (published, general)))


def _predict(one: Any, sample: torch.Tensor) -> torch.Tensor:
    denoiser = Denoiser(one.load(), one.condition(range(len(sample))), Clock(1))
    with torch.inference_mode():
        return denoiser(sample, 500)


@pytest.mark.parametrize("name", LATENT_MODELS)
def test_an_image_is_the_decoded_latent(standins: dict[str, Path], name: str) -> None:
    """Divided by the scale that is in the configuration, in parts as in one."""
    found = model(standins, name)
    config = json.loads((standins[name] / found.first_stage.component / "config.json").read_text())
    latents = torch.randn(11, *found.shape) * 0.3
    from diffusers import AutoencoderKL, VQModel

    kind = VQModel if found.first_stage.component == "vqvae" else AutoencoderKL
    network = kind.from_pretrained(standins[name] / found.first_stage.component).eval()
    with torch.no_grad():
        wanted = network.decode(latents / config["scaling_factor"]).sample
    shape = found.image_shape
    assert shape == tuple(wanted.shape[1:]) == (3, shape[1], shape[1])
    different = (found.decode(latents).int() - to_uint8(wanted).int()).abs()
    assert different.max() <= 1  # another batch, another last bit
    assert different.float().mean() < 0.01


def test_the_scale_matters(changed: Callable[[str], dict[str, Path]]) -> None:
    folders = changed("ldm-lsun-churches")
    path = folders["ldm-lsun-churches"] / "vae" / "config.json"
    latents = torch.randn(1, *model(folders, "ldm-lsun-churches").shape)
    images = []
    for scale in (0.5, 0.25):
        path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": scale}))
        images.append(model(folders, "ldm-lsun-churches").decode(latents * scale))
    assert torch.equal(*images)


def test_a_folder_from_before_the_scale_was_written_down_has_that_of_diffusers(
    changed: Callable[[str], dict[str, Path]],
) -> None:
    folders = changed("stable-diffusion-v1")
    path = folders["stable-diffusion-v1"] / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    wanted = AutoencoderKL.from_config(config).config.scaling_factor
    assert wanted == 0.18215
    latents = torch.randn(1, *model(folders, "stable-diffusion-v1").shape)
    scaled = latents * wanted
    images = model(folders, "stable-diffusion-v1").decode(scaled)
    path.write_text(json.dumps({**config, "scaling_factor": 1.0}))
    plain = model(folders, "stable-diffusion-v1").decode(scaled / wanted)
    assert torch.allclose(images, plain, atol=1e-5)
    path.write_text(json.dumps({**config, "scaling_factor": None}))
    with pytest.raises(ConfigError, match="must say scaling_factor"):
        model(folders, "stable-diffusion-v1")


def test_weights_with_the_old_names_of_attention_are_read(
    changed: Callable[[str], dict[str, Path]],
) -> None:
    """As folders on the hub from before diffusers 0.15 have them, Stable Diffusion's first."""
    folders = changed("stable-diffusion-v1")
    latents = torch.randn(1, *model(folders, "stable-diffusion-v1").shape)
    wanted = model(folders, "stable-diffusion-v1").decode(latents)
    path = folders["stable-diffusion-v1"] / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): one for key, one in weights.items()}
    assert sum(".proj_attn." in key for key in weights) == 4  # encoder's and decoder's
    save_file(weights, path)
    assert torch.equal(model(folders, "stable-diffusion-v1").decode(latents), wanted)


# --- classes ----------------------------------------------------------------------------------


def test_imagenet_is_told_the_embedded_class_and_none(standins: dict[str, Path]) -> None:
    table = load_file(
        standins["ldm-imagenet"] / "class_embedder" / "diffusion_pytorch_model.safetensors"
    )["weight"]
    condition = model(standins, "ldm-imagenet").condition([3, 1003, 999])
    assert torch.equal(condition.inputs["encoder_hidden_states"][:, 0], table[[3, 3, 999]])
    assert condition.unconditional is not None
    nothing = condition.unconditional["encoder_hidden_states"]
    assert torch.equal(nothing[:, 0], table[[1000] * 3])
    assert condition.scale == 1.5


def test_a_label_list_decides_the_classes(standins: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("5 2\n700 1\n")
    found = model(standins, "ldm-imagenet", labels=str(tmp_path / "labels.txt"), guidance=1.0)
    plain = model(standins, "ldm-imagenet", guidance=1.0)
    for image, label in enumerate([5, 5, 700, 5]):
        wanted = plain.condition([label]).inputs["encoder_hidden_states"]
        assert torch.equal(found.condition([image]).inputs["encoder_hidden_states"], wanted)
    assert not found.condition([0]).guided


def test_calibration_sees_classes_of_the_whole_list(
    standins: dict[str, Path], tmp_path: Path
) -> None:
    """The first images of a class-major list are all of one class."""
    lines = "\n".join(f"{label} 50" for label in range(1000))
    (tmp_path / "labels.txt").write_text(lines)
    found = model(standins, "ldm-imagenet", labels=str(tmp_path / "labels.txt"))
    states = found.calibration_condition(range(32)).inputs["encoder_hidden_states"]
    assert len(states.unique(dim=0)) == 32
    states = found.condition(range(32)).inputs["encoder_hidden_states"]
    assert len(states.unique(dim=0)) == 1


def test_a_calibration_run_is_shown_them(standins: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(f"{label} 50" for label in range(1000)))
    found = model(standins, "ldm-imagenet", labels=str(tmp_path / "labels.txt"))
    network, states = found.load(), list[torch.Tensor]()
    network.register_forward_pre_hook(
        lambda module, args, inputs: states.append(inputs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    sampler = build(DDIM, {"steps": 1, "spacing": "ldm"}, found.schedule)
    Bench(network, Clock(1), found, sampler, seed=0, images=8).run([])
    assert len(states[0].unique(dim=0)) == 9  # eight classes and none


def test_another_list_makes_other_images(standins: dict[str, Path], tmp_path: Path) -> None:
    """Its content is part of what the model is."""
    (tmp_path / "a.txt").write_text("5 2\n")
    (tmp_path / "b.txt").write_text("6 2\n")
    made = [
        model(standins, "ldm-imagenet", labels=str(tmp_path / f"{x}.txt")).identity() for x in "ab"
    ]
    assert {key for key in made[0] if made[0][key] != made[1][key]} == {"labels"}


# --- prompts ----------------------------------------------------------------------------------


def test_a_prompt_is_encoded_as_the_library_does(standins: dict[str, Path]) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = standins["stable-diffusion-v1"]
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    found = model(standins, "stable-diffusion-v1").condition([1, 3])
    for texts, states in (
        ([PROMPTS[1], PROMPTS[0]], found.inputs["encoder_hidden_states"]),
        (["", ""], found.unconditional["encoder_hidden_states"]),
    ):
        tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
        with torch.no_grad():
            wanted = encoder(tokens.input_ids).last_hidden_state
        assert wanted.shape == (2, 77, STATES)
        torch.testing.assert_close(states, wanted)
    assert found.scale == 7.5


def test_captions_are_the_prompts_by_index(standins: dict[str, Path]) -> None:
    found = model(standins, "stable-diffusion-v1")
    assert found.captions([0, 4, 2]) == [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    assert model(standins, "ldm-lsun-churches").captions([0]) is None


def test_a_long_prompt_is_cut_before_its_end_token_and_told(
    standins: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("cat\n" + "cat " * 90 + "\n" + "cat " * 75 + "\n")
    found = model(standins, "stable-diffusion-v1", prompts=str(tmp_path / "long.txt"))
    states = found.condition([1, 2]).inputs["encoder_hidden_states"]
    assert "1 of 3 prompts are longer than 77 tokens" in capsys.readouterr().err
    assert torch.equal(states[0], states[1])  # 75 words, one start and one end token
    found.condition([0])
    assert capsys.readouterr().err == ""  # once


def test_one_prompt_for_all_and_what_to_lead_away_from(standins: dict[str, Path]) -> None:
    found = build(
        StableDiffusion,
        {
            "path": str(standins["stable-diffusion-v1"]),
            "prompt": "a cat",
            "negative_prompt": "two dogs on a hill",
        },
    )
    other = model(standins, "stable-diffusion-v1")
    states = found.condition([5]).inputs["encoder_hidden_states"]
    torch.testing.assert_close(states, other.condition([0]).inputs["encoder_hidden_states"])
    away = found.condition([5]).unconditional["encoder_hidden_states"]
    torch.testing.assert_close(away, other.condition([1]).inputs["encoder_hidden_states"])


# --- how many processes -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 3])
def test_every_world_size_pairs_the_same_prompts_and_images(
    standins: dict[str, Path],
    scoring: Callable[[int], Path],
    tmp_path: Path,
    write_study: Callable[..., Path],
    devices: int,
) -> None:
    """Images of one process and of several are equal to the bit, so each had its own prompt."""
    chosen = {"name": "stable-diffusion-v1", **options(standins, "stable-diffusion-v1")}
    study = write_study(
        tmp_path,
        model=chosen,
        sampler={"name": "ddim", "steps": 4, "spacing": "ldm"},
        images={"seed": 1, "count": 6},
        metrics=[{"name": "is", "features": str(scoring(64)), "splits": 1}],
        variants=[{"name": "full precision"}],
        execution={"batch_size": 1, "chunk_size": 1, "threads": 1, "accelerator": "cpu"},
    )
    images = {}
    for processes in (1, devices):
        out = tmp_path / str(processes)
        images[processes] = _generated(study, out, processes)
    assert torch.equal(images[1], images[devices])
    assert len(images[1].unique(dim=0)) == 6


def _generated(study: Path, out: Path, devices: int) -> torch.Tensor:
    words = ("generate", study, "-o", out, "-s", f"execution.devices={devices}")
    with started(*words) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    chunks = sorted(out.glob("*/chunks/*.safetensors"))
    return torch.cat([read_tensors(path)[0]["images"] for path in chunks])


# --- without the files ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_structure_without_files(name: str) -> None:
    told = {"prompts": "none.txt"} if name == "stable-diffusion-v1" else {}
    found = build(CLASSES[name], {"path": "nowhere", **told})
    assert all(p.device.type == "meta" for p in found.skeleton().parameters())
    assert found.missing()[0].startswith("model: nowhere/unet/config.json not found")
    assert found.image_shape[1] == {"ddpm-cifar10": 32, "stable-diffusion-v1": 512}.get(name, 256)
    with pytest.raises(ConfigError, match="not found"):
        found.load()


def test_a_general_model_needs_its_files() -> None:
    with pytest.raises(ConfigError, match=r"nowhere/unet/config\.json not found; wanted a folder"):
        build(LatentDiffusion, {"path": "nowhere"})


def test_a_checkpoint_file_is_to_be_converted_first(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"is a file, .* iec-eval convert"):
        build(LatentDiffusion, {"path": str(tmp_path / "model.ckpt")})


@pytest.mark.parametrize(
    "missing", ["vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
def test_a_missing_file_is_named(changed: Callable[[str], dict[str, Path]], missing: str) -> None:
    folders = changed("stable-diffusion-v1")
    (folders["stable-diffusion-v1"] / missing).unlink()
    found = model(folders, "stable-diffusion-v1")
    assert any(missing in line for line in found.missing())
    with pytest.raises(ConfigError, match=missing):
        found.identity()


# --- which weights ----------------------------------------------------------------------------


def test_the_kind_of_weights_is_checked_and_recorded(
    changed: Callable[[str], dict[str, Path]],
) -> None:
    folders = changed("ldm-lsun-bedrooms")
    path = folders["ldm-lsun-bedrooms"]
    with pytest.raises(ConfigError, match=r"wanted ema weights, found no conversion\.json"):
        model(folders, "ldm-lsun-bedrooms", weights="ema")
    (path / "conversion.json").write_text(json.dumps({"weights": "raw"}))
    with pytest.raises(ConfigError, match="wanted ema weights, found raw; convert"):
        model(folders, "ldm-lsun-bedrooms", weights="ema")
    assert model(folders, "ldm-lsun-bedrooms", weights="raw").identity()["weights"] == "raw"


# --- what can be wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("ldm-imagenet", {"label": 1000}, ConfigError, "label 1000: the model has 1000 classes"),
        ("ldm-imagenet", {"label": 1, "labels": "x"}, ConfigError, "give label or labels"),
        ("ldm-imagenet", {"prompts": "x"}, ConfigError, "unknown key 'prompts'"),
        ("stable-diffusion-v1", {"prompt": "a"}, ConfigError, "give prompts, a file, or prompt"),
        ("ldm-lsun-churches", {"guidance": 2.0}, ConfigError, "unknown key 'guidance'"),
        ("ddpm-cifar10", {"label": 1}, ConfigError, "unknown key 'label'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    standins: dict[str, Path], name: str, given: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(standins, name, **given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ldm-imagenet", {"prompt": "a cat"}, "is told classes, so prompt would have no effect"),
        ("ldm-lsun-churches", {"label": 3}, "is unconditional, so label would have no effect"),
        ("ldm-lsun-churches", {"guidance": 3.0}, "so guidance would have no effect"),
        ("stable-diffusion-v1", {"prompt": "a", "label": 1}, "is told texts, so label would"),
    ],
)
def test_the_general_model_refuses_options_without_effect(
    standins: dict[str, Path], name: str, given: Any, message: str
) -> None:
    with pytest.raises(Incompatible, match=message):
        build(LatentDiffusion, {"path": str(standins[name]), **given})


def test_pixel_and_latent_models_are_not_taken_for_each_other(standins: dict[str, Path]) -> None:
    with pytest.raises(Incompatible, match=r"has a first stage .* use the model latent-diffusion"):
        build(CLASSES["unet"], {"path": str(standins["ldm-lsun-churches"])})
    with pytest.raises(Incompatible, match=r"has no first stage .* use the model unet"):
        build(LatentDiffusion, {"path": str(standins["ddpm-cifar10"])})


def test_damaged_weights_of_each_part_are_named(
    changed: Callable[[str], dict[str, Path]],
) -> None:
    folders = changed("stable-diffusion-v1")
    for part, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folders["stable-diffusion-v1"] / part / f"{file}.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
    found = model(folders, "stable-diffusion-v1")
    with pytest.raises(CorruptFile, match=r"text_encoder/model\.safetensors: cannot be read"):
        found.condition([0])
    with pytest.raises(CorruptFile, match=r"vae/diffusion_pytorch_model\.safetensors: cannot be"):
        found.decode(torch.randn(1, 4, LATENT, LATENT))


def test_a_wrong_embedder_is_named(changed: Callable[[str], dict[str, Path]]) -> None:
    folders = changed("ldm-imagenet")
    path = folders["ldm-imagenet"] / "class_embedder" / "diffusion_pytorch_model.safetensors"
    save_file({"weight": torch.zeros(7, STATES)}, path)
    with pytest.raises(
        ConfigError, match=r"wanted one tensor weight \(1001, 64\), got .*\(7, 64\)"
    ):
        build(ImageNet, options(folders, "ldm-imagenet")).condition([0])


@pytest.mark.parametrize("spec", ["hub:owner", "hub:a/b/c", "hub:", "hub:a..b/c", "hub:-a/c--d"])
def test_a_hub_id_has_a_form(spec: str) -> None:
    with pytest.raises(ConfigError, match="wanted hub:owner/name"):
        build(LSUNBedrooms, {"path": spec})


# --- from the hub -----------------------------------------------------------------------------


@pytest.fixture
def hub_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[bool]]:
    """``hub_of(folder)``: a hub whose one repository it is; notes what was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    def replace(folder: Path) -> list[bool]:
        asked, cache = list[bool](), folder.parent / "cache"

        def snapshot(
            repo: str, *, revision: Any, local_files_only: bool = False, **how: Any
        ) -> str:
            assert (repo, revision) == ("owner/name", None)
            asked.append(local_files_only)
            if local_files_only and not cache.exists():
                raise LocalEntryNotFoundError("not here")
            there = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
            wanted = [] if local_files_only else how["allow_patterns"]
            for name in filter_repo_objects(there, allow_patterns=wanted):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, cache / name)
            return str(cache)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        return asked

    return replace


@pytest.mark.parametrize("kind", ["published", "general", "root", "cut short"])
def test_what_a_hub_id_names_is_downloaded_by_launch_and_not_by_show(
    standins: dict[str, Path],
    hub_of: Callable[[Path], list[bool]],
    write_study: Callable[..., Path],
    scoring: Callable[[int], Path],
    cli: Cli,
    tmp_path: Path,
    kind: str,
) -> None:
    """A repository of folders, or of the U-Net alone at its root; also after a killed download."""
    name = "ddpm-cifar10" if kind == "root" else "ldm-lsun-churches"
    repository = tmp_path / "repository"
    shutil.copytree(standins[name], repository)
    if kind == "root":
        (repository / "scheduler" / "scheduler_config.json").rename(
            repository / "scheduler_config.json"
        )
        for path in [*(repository / "unet").iterdir()]:
            path.rename(repository / path.name)
    if kind == "cut short":
        shutil.copytree(repository / "unet", tmp_path / "cache" / "unet")
        shutil.copytree(repository / "scheduler", tmp_path / "cache" / "scheduler")
    asked = hub_of(repository)
    model = {"path": "hub:owner/name", "name": "latent-diffusion" if kind == "general" else name}
    study = write_study(
        tmp_path,
        model=model,
        sampler={"name": "ddim", "steps": 2},
        images={"count": 2},
        metrics=[
            {"name": "is", "features": str(scoring(8 if kind == "root" else 128)), "splits": 1}
        ],
        variants=[{"name": "full precision"}],
    )
    shown = cli("show", study)
    assert ("hub:owner/name: not downloaded yet" in shown.output) == (kind == "general")
    assert all(asked)  # only what is here already
    done = cli("launch", study, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert not all(asked)


# --- what would otherwise go on silently ------------------------------------------------------


def test_an_unfinished_conversion_is_no_other_model(
    changed: Callable[[str], dict[str, Path]],
) -> None:
    """Without its first stage yet it looks like a pixel model."""
    folders = changed("ldm-lsun-bedrooms")
    path = folders["ldm-lsun-bedrooms"]
    shutil.rmtree(path / "vqvae")
    (path / "conversion.json").write_text(json.dumps({"weights": "raw", "finished": False}))
    for name in ("ldm-lsun-bedrooms", "unet"):
        with pytest.raises(ConfigError, match="its conversion was not finished"):
            build(CLASSES[name], {"path": str(path)})


def test_a_scheduler_without_betas_is_not_given_default_ones(
    changed: Callable[[str], dict[str, Path]],
) -> None:
    folders = changed("ldm-lsun-churches")
    path = folders["ldm-lsun-churches"] / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "ScoreSdeVeScheduler"}))
    with pytest.raises(ConfigError, match=r"does not say beta_schedule, .*ScoreSdeVeScheduler"):
        model(folders, "ldm-lsun-churches")
    path.write_text(json.dumps({"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 2.0}))
    with pytest.raises(ConfigError, match=r"betas outside 0\.\.1"):
        model(folders, "ldm-lsun-churches")


def test_an_unconditional_model_refuses_a_conditional_folder(standins: dict[str, Path]) -> None:
    with pytest.raises(Incompatible, match=r"wanted a UNet2DModel or .* got UNet2DConditionModel"):
        build(CLASSES["ldm-lsun-churches"], {"path": str(standins["ldm-imagenet"])})


def test_calibration_without_a_list_sees_all_sorts_of_classes(standins: dict[str, Path]) -> None:
    found = model(standins, "ldm-imagenet", guidance=1.0)
    table = found.condition(range(1000)).inputs["encoder_hidden_states"]
    seen = found.calibration_condition(range(10)).inputs["encoder_hidden_states"]
    labels = [int((table == state).all(dim=(1, 2)).nonzero()) for state in seen]
    assert max(labels) > 800
    assert min(labels) < 200


def test_a_prompt_to_lead_away_from_needs_guidance(standins: dict[str, Path]) -> None:
    with pytest.raises(Incompatible, match="negative_prompt would have no effect"):
        model(standins, "stable-diffusion-v1", guidance=1.0, negative_prompt="a cat")


def test_latents_that_are_not_finite_fail_their_row(
    changed: Callable[[str], dict[str, Path]],
    write_study: Callable[..., Path],
    scoring: Callable[[int], Path],
    cli: Cli,
    tmp_path: Path,
) -> None:
    """They would become black images."""
    folders = changed("ldm-lsun-churches")
    path = folders["ldm-lsun-churches"] / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, path)
    study = write_study(
        tmp_path,
        model={"name": "ldm-lsun-churches", **options(folders, "ldm-lsun-churches")},
        sampler={"name": "ddim", "steps": 2},
        images={"count": 2},
        metrics=[{"name": "is", "features": str(scoring(128)), "splits": 1}],
        variants=[{"name": "full precision"}],
    )
    done = cli("launch", study, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "latents are not finite" in done.output
