"""Train a small class-conditional DDPM (Ho et al. 2020, eq. 14) with label dropout.

Everything random is a function of (seed, step), so a run that was stopped and resumed ends with
the weights of an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.storage import atomic_path

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class DenoiserRecipe:
    """Every choice of the training run; stored with the checkpoint and in the data card.

    ``channels`` are the widths of the resolution levels, ``attention_level`` the one with
    self-attention. The learning rate rises over ``warmup`` steps, stays, and falls linearly over
    the last fifth of ``steps``, so raising ``steps`` of an unfinished run changes nothing before.
    """

    steps: int = 9000
    batch: int = 64
    learning_rate: float = 1.0e-3
    warmup: int = 500
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    channels: tuple[int, ...] = (32, 64, 96)
    attention_level: int = 1
    seed: int = 0


@dataclass
class TrainingState:
    """The moving parts of a run, saved and restored together."""

    network: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int
    losses: list[float]

    def save(self, path: Path, recipe: DenoiserRecipe) -> None:
        """Write everything needed to go on, atomically."""
        with atomic_path(path) as temporary:
            torch.save(
                {
                    "network": self.network.state_dict(),
                    "average": self.average.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "losses": self.losses,
                    "recipe": asdict(recipe),
                },
                temporary,
            )

    def restore(self, path: Path, recipe: DenoiserRecipe) -> None:
        """Continue from ``path``.

        Raises CorruptFile if it cannot be read, ConfigError if it was made by another recipe
        (only ``steps`` may differ).
        """
        saved = _load_checkpoint(path)
        differing = _differences(saved["recipe"], asdict(recipe))
        if differing:
            raise ConfigError(f"{path} was made with {differing}; use another folder or the same")
        self.network.load_state_dict(saved["network"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.losses = saved["step"], saved["losses"]


def build_network(recipe: DenoiserRecipe, shape: Sequence[int], classes: int) -> Any:
    """diffusers' UNet2DModel for ``[C, H, W]`` images; class ``classes`` means "no label"."""
    from diffusers import UNet2DModel

    levels = len(recipe.channels)
    attention = recipe.attention_level
    down = ["AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(levels)]
    up = ["AttnUpBlock2D" if i == attention else "UpBlock2D" for i in reversed(range(levels))]
    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=2,
        block_out_channels=recipe.channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        norm_num_groups=8,
        attention_head_dim=None,
        num_class_embeds=classes + 1,
    )


def train_denoiser(
    images: Tensor,
    labels: Tensor,
    recipe: DenoiserRecipe,
    folder: Path,
    *,
    report: Callable[[int, float, float], None],
    save_every: int = 500,
) -> TrainingState:
    """Train on uint8 ``images [N, C, H, W]`` with int64 ``labels [N]``, resuming if possible.

    ``report(step, mean loss, seconds a step)`` is called every 100 steps. The checkpoint
    ``folder/training.pt`` is written every ``save_every`` steps and at the end.
    """
    from diffusers import DDPMScheduler

    classes = int(labels.max()) + 1
    torch.manual_seed(recipe.seed)
    state = _new_state(recipe, build_network(recipe, images.shape[1:], classes))
    checkpoint = folder / "training.pt"
    if checkpoint.exists():
        state.restore(checkpoint, recipe)
    scheduler = DDPMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="linear")
    pixels = images.float() / 127.5 - 1
    began, recent = time.monotonic(), list[float]()
    state.network.train()
    while state.step < recipe.steps:
        recent.append(_train_step(state, pixels, labels, recipe, scheduler))
        if state.step % 100 == 0:
            state.losses.append(sum(recent) / len(recent))
            report(state.step, state.losses[-1], (time.monotonic() - began) / len(recent))
            began, recent = time.monotonic(), []
        if state.step % save_every == 0 or state.step == recipe.steps:
            state.save(checkpoint, recipe)
    return state


def learning_rate_factor(step: int, recipe: DenoiserRecipe) -> float:
    """Warm up, stay at 1, fall linearly to 0 over the last fifth."""
    decay = recipe.steps // 5
    return min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / decay)


def _new_state(recipe: DenoiserRecipe, network: nn.Module) -> TrainingState:
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    return TrainingState(network, average, optimizer, step=0, losses=[])


def _train_step(
    state: TrainingState, pixels: Tensor, labels: Tensor, recipe: DenoiserRecipe, scheduler: Any
) -> float:
    random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state.step)
    chosen = _batch_indices(len(pixels), state.step, recipe)
    clean, label = pixels[chosen], labels[chosen].clone()
    label[torch.rand(len(label), generator=random) < recipe.label_dropout] = int(labels.max()) + 1
    timesteps = _spread_timesteps(len(chosen), random)
    noise = torch.randn(clean.shape, generator=random)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    loss = F.mse_loss(state.network(noisy, timesteps, class_labels=label).sample, noise)
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.learning_rate * learning_rate_factor(state.step, recipe)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    state.optimizer.step()
    state.average.update_parameters(state.network)
    state.step += 1
    return float(loss.detach())


def _batch_indices(count: int, step: int, recipe: DenoiserRecipe) -> Tensor:
    """Images of this step: consecutive slices of one seeded permutation per epoch."""
    per_epoch = max(count // recipe.batch, 1)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(recipe.seed + epoch))
    return order[position * recipe.batch : (position + 1) * recipe.batch]


def _spread_timesteps(count: int, random: torch.Generator) -> Tensor:
    """Uniform timesteps, spread evenly over the batch (Kingma et al. 2021, appendix I.1)."""
    offsets = (torch.rand(1, generator=random) + torch.arange(count) / count) % 1
    return (offsets * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises a zoo of types for a damaged file
        raise CorruptFile(f"{path}: not a readable checkpoint ({error}); delete it") from error


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    same = {**saved, "channels": tuple(saved["channels"]), "steps": wanted["steps"]}
    return {key: value for key, value in same.items() if value != wanted[key]}
