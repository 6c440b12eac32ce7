"""What a converted folder is made of, and whether a checkpoint holds exactly that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iec_eval.conversion.checkpoints import EMA, EMA_COUNTERS, UNET, Checkpoint
from iec_eval.conversion.families import Weights
from iec_eval.conversion.key_maps import (
    KeyMap,
    Origin,
    class_embedder_map,
    ddpm_unet_map,
    first_stage_map,
    latent_unet_map,
    text_encoder_shapes,
    whole,
)
from iec_eval.conversion.layouts import Layout, layout
from iec_eval.conversion.original import DDPM, Configuration, LatentDiffusion
from iec_eval.conversion.writing import Part
from iec_eval.errors import CorruptFile
from iec_eval.networks import build_first_stage, build_network
from iec_eval.schedule import NoiseSchedule

FIRST_STAGE, CONDITION = "first_stage_model.", "cond_stage_model."
TEXT = f"{CONDITION}transformer."
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS_FILE = "model.safetensors"
IGNORED = (  # buffers that the configuration implies, and what only training needs
    "alphas_cumprod",
    "betas",
    "cond_ids",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_",
    "scale_factor",
    "sqrt_",
)
SCHEDULE_TOLERANCE = 1e-5  # relative; the buffers are rounded to float32
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Component:
    """One folder: its configuration and, but for the scheduler, its weights.

    Attributes:
        origins: where each tensor is in the checkpoint, by its name there.
        shapes: what each tensor must have, by its new name.
    """

    name: str
    config: dict[str, Any]
    origins: KeyMap
    shapes: Shapes

    @property
    def config_file(self) -> str:
        """The file name of the configuration."""
        return "scheduler_config.json" if self.name == "scheduler" else "config.json"

    @property
    def weights_file(self) -> str | None:
        """The file name of the weights, if there are any."""
        if not self.origins:
            return None
        return TEXT_WEIGHTS_FILE if self.name == "text_encoder" else WEIGHTS_FILE

    def parts(self, checkpoint: Checkpoint) -> dict[str, Part]:
        """The tensors to be written, each taken from the checkpoint when its turn comes.

        Reading one raises CorruptFile if a number in it is not finite.
        """
        tensors = checkpoint.tensors
        return {
            name: Part(tensors[origin.name].dtype, self.shapes[name], _reader(checkpoint, origin))
            for name, origin in self.origins.items()
        }


def plan_components(
    original: Configuration, checkpoint: Checkpoint, weights: Weights
) -> list[Component]:
    """The components of a model, everything about ``checkpoint`` checked and nothing written.

    Raises CorruptFile, naming the file and the key, if a tensor is missing, unknown or of another
    shape, or if the checkpoint was trained with another noise schedule.
    """
    configs = layout(original, _scale_factor(original, checkpoint))
    planned = _plan(original, configs, ema=weights == "ema" and checkpoint.ema is None)
    _check_schedule(configs["scheduler"], checkpoint)
    for component in planned:
        _check_tensors(component, checkpoint)
    known = {origin.name for component in planned for origin in component.origins.values()}
    _check_nothing_is_left(checkpoint, known, planned[0])
    return planned


def _plan(original: Configuration, configs: Layout, *, ema: bool) -> list[Component]:
    with torch.device("meta"):
        unet = _shapes(build_network(configs["unet"]))
    if isinstance(original, DDPM):
        origins = _present(ddpm_unet_map(original), unet)
        return [Component("unet", configs["unet"], origins, unet), _scheduler(configs)]
    origins = _present(latent_unet_map(original.unet_config.params), unet)
    origins = _renamed(origins, ema_name if ema else lambda name: UNET + name)
    found = [Component("unet", configs["unet"], origins, unet), _scheduler(configs)]
    found.append(_first_stage(original, configs))
    return found + _conditioning(configs)


def _scheduler(configs: Layout) -> Component:
    return Component("scheduler", configs["scheduler"], {}, {})


def _first_stage(original: LatentDiffusion, configs: Layout) -> Component:
    name = "vqvae" if original.first_stage_config.quantizes else "vae"
    with torch.device("meta"):
        shapes = _shapes(build_first_stage(configs[name]))
    origins = _present(first_stage_map(original.first_stage_config.params.ddconfig), shapes)
    return Component(name, configs[name], _renamed(origins, lambda n: FIRST_STAGE + n), shapes)


def _conditioning(configs: Layout) -> list[Component]:
    if "class_embedder" in configs:
        config = configs["class_embedder"]
        origins = _renamed(class_embedder_map(), lambda name: CONDITION + name)
        shapes: Shapes = {"weight": (config["num_embeddings"], config["dim"])}
        return [Component("class_embedder", config, origins, shapes)]
    if "text_encoder" in configs:
        config = configs["text_encoder"]
        shapes = text_encoder_shapes(config)
        origins = {name: Origin(TEXT + name) for name in shapes}
        return [Component("text_encoder", config, origins, shapes)]
    return []


def ema_name(name: str) -> str:
    """The averaged copy's name of a tensor of the U-Net: latent diffusion drops every dot."""
    return EMA + f"diffusion_model.{name}".replace(".", "")


def _shapes(network: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _present(origins: KeyMap, shapes: Shapes) -> KeyMap:
    """The map of those layers that the network has."""
    return {name: origins[name] for name in shapes}


def _renamed(origins: KeyMap, rename: Any) -> KeyMap:
    return {new: Origin(rename(origin.name), origin.take) for new, origin in origins.items()}


def _reader(checkpoint: Checkpoint, origin: Origin) -> Callable[[], Tensor]:
    def read() -> Tensor:
        value = origin.take(checkpoint.tensors[origin.name])
        if not torch.isfinite(value.float()).all():
            raise CorruptFile(
                f"checkpoint {checkpoint.path}: key {origin.name!r} holds numbers that are not "
                "finite: its training failed, or the file is damaged"
            )
        return value

    return read


def _scale_factor(original: Configuration, checkpoint: Checkpoint) -> float | None:
    """The checkpoint's own scale factor, which only models with ``scale_by_std`` have."""
    if isinstance(original, DDPM):
        return None
    found = checkpoint.tensors.get("scale_factor")
    if not original.scale_by_std:
        if found is not None and abs(float(found) / original.scale_factor - 1) > 1e-5:
            raise CorruptFile(
                f"checkpoint {checkpoint.path}: key 'scale_factor' is {float(found):.6g}, wanted "
                f"{original.scale_factor:.6g} (the configuration has no scale_by_std: true); is "
                "it another model's? give its own configuration with --config"
            )
        return None
    if found is None or found.numel() != 1 or not 0 < float(found) < math.inf:
        got = "is missing" if found is None else f"is {found.flatten()[:3].tolist()}"
        raise CorruptFile(
            f"checkpoint {checkpoint.path}: key 'scale_factor' {got}, wanted one positive number, "
            "measured in training (scale_by_std)"
        )
    return float(found)


def _check_schedule(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    schedule = NoiseSchedule.from_betas(
        config["beta_schedule"],
        config["beta_start"],
        config["beta_end"],
        config["num_train_timesteps"],
    )
    abar = schedule.alphas_cumprod
    previous = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    for name, wanted in {"alphas_cumprod": abar, "betas": 1 - abar / previous}.items():
        found = checkpoint.tensors.get(name)
        if found is None:
            continue
        if found.shape != wanted.shape:
            got = f"has shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
            raise CorruptFile(f"checkpoint {checkpoint.path}: key {name!r} {got}")
        apart = float((found.double() / wanted - 1).abs().max())
        limit = max(SCHEDULE_TOLERANCE, 8 * torch.finfo(found.dtype).eps)  # some are in half
        if not apart <= limit:
            raise CorruptFile(
                f"checkpoint {checkpoint.path}: its noise schedule is not the configuration's: key "
                f"{name!r} wanted {float(wanted[0]):.6g} to {float(wanted[-1]):.6g}, got "
                f"{float(found[0]):.6g} to {float(found[-1]):.6g}; is it another model's? give its "
                "own configuration with --config"
            )


def _check_tensors(component: Component, checkpoint: Checkpoint) -> None:
    place = f"checkpoint {checkpoint.path}: {component.name}"
    hint = "is it this family's, whole? give its own configuration with --config"
    for name, origin in component.origins.items():
        wanted, found = component.shapes[name], checkpoint.tensors.get(origin.name)
        if found is None:
            raise CorruptFile(
                f"{place}: key {origin.name!r} is missing, wanted shape {wanted}; {hint}"
            )
        got = tuple(found.shape)
        if _shape_taken(found, origin) != wanted:
            raise CorruptFile(
                f"{place}: key {origin.name!r} has shape {got}, wanted {_wanted(wanted, origin)}; "
                f"{hint}"
            )
        if not found.is_floating_point():
            raise CorruptFile(
                f"{place}: key {origin.name!r} is {found.dtype}, wanted floating-point weights"
            )


def _wanted(shape: tuple[int, ...], origin: Origin) -> str:
    return f"{shape}" if origin.take is whole else f"one from which {shape} can be taken"


def _shape_taken(value: Tensor, origin: Origin) -> tuple[int, ...] | None:
    """The shape of what is taken, None where it cannot be taken; reads nothing."""
    try:
        return tuple(origin.take(value.to("meta")).shape)
    except (IndexError, RuntimeError, ValueError):
        return None


def _check_nothing_is_left(checkpoint: Checkpoint, known: set[str], unet: Component) -> None:
    """Every tensor of the checkpoint is converted, or of a kind that is left out on purpose."""
    spare = set()  # the other of two sets of weights
    chosen = next(iter(unet.origins.values())).name
    if chosen.startswith((EMA, UNET)):
        other = UNET if chosen.startswith(EMA) else EMA
        spare = {name for name in checkpoint.tensors if name.startswith(other)}
    rest = checkpoint.tensors.keys() - known - spare - EMA_COUNTERS
    unknown = sorted(name for name in rest if not name.startswith(IGNORED))
    if unknown:
        raise CorruptFile(
            f"checkpoint {checkpoint.path}: unknown keys {', '.join(unknown[:3])}, {len(unknown)} "
            "in all; the configuration describes a smaller or another model, give its own with "
            "--config"
        )
