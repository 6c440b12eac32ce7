"""Train the small classifier that serves as a feature network for images of its own kind.

Everything random is a function of (seed, step), so a run that was stopped and resumed ends with
the weights of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.metrics.features import CARD, WEIGHTS, ClassifierCard, ImageClassifier
from iec_eval.options import validated
from iec_eval.storage import atomic_path


@dataclass(frozen=True)
class ClassifierRecipe:
    """Every choice of the training run; stored with the checkpoint and on the card.

    The learning rate rises linearly to ``learning_rate`` over the first ``warmup`` share of the
    steps and falls to zero along a cosine.
    """

    epochs: int = 15
    batch: int = 128
    learning_rate: float = 6.0e-3
    warmup: float = 0.2
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    width: int = 48
    seed: int = 0


@dataclass
class ClassifierTraining:
    """The moving parts of a run, saved and restored together."""

    network: ImageClassifier
    optimizer: torch.optim.Optimizer
    epoch: int = 0

    def save(self, path: Path, recipe: ClassifierRecipe) -> None:
        """Write everything needed to go on, atomically."""
        content = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "recipe": asdict(recipe),
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    def restore(self, path: Path, recipe: ClassifierRecipe) -> None:
        """Continue from ``path``.

        Raises CorruptFile if it cannot be read, ConfigError if it was made by another recipe.
        """
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a zoo of types for a damaged file
            raise CorruptFile(f"{path}: not a readable checkpoint ({error}); delete it") from error
        if saved["recipe"] != asdict(recipe):
            raise ConfigError(
                f"{path} was made with {saved['recipe']}, not {asdict(recipe)}; "
                "use another folder or the same recipe"
            )
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch = saved["epoch"]


def train_classifier(
    images: Tensor,
    labels: Tensor,
    recipe: ClassifierRecipe,
    folder: Path,
    *,
    report: Callable[[int, float, float], None],
) -> ImageClassifier:
    """Train on uint8 ``images [N, C, H, W]`` with int64 ``labels [N]``, resuming if possible.

    ``report(epoch, mean loss, seconds)`` is called after each epoch, when the checkpoint
    ``folder/classifier.pt`` is on disk. Returns the network in eval mode.
    """
    state = _new_training(recipe, images, classes=int(labels.max()) + 1)
    checkpoint = folder / "classifier.pt"
    if checkpoint.exists():
        state.restore(checkpoint, recipe)
    while state.epoch < recipe.epochs:
        began = time.monotonic()
        loss = _train_epoch(state, images, labels, recipe)
        state.save(checkpoint, recipe)
        report(state.epoch, loss, time.monotonic() - began)
    return state.network.eval()


@torch.no_grad()
def accuracy(
    network: ImageClassifier, images: Tensor, labels: Tensor, *, batch_size: int = 500
) -> float:
    """Share of uint8 ``images [N, C, H, W]`` whose largest logit is their label's."""
    network.eval()
    right = 0
    for part, label in zip(
        torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
    ):
        right += int((network(part)[1].argmax(dim=1) == label).sum())
    return right / len(images)


def save_features(
    network: ImageClassifier, folder: Path, tag: str, *, notes: Mapping[str, Any] | None = None
) -> None:
    """Write the folder that ``iec_eval.metrics.features.ClassifierFeatures`` reads.

    ``tag`` names the results (``fid-<tag>``), ``notes`` say how the network was made. Raises
    ConfigError for a tag that is not lower-case words joined by hyphens.
    """
    values = {
        "tag": tag,
        "channels": network.channels,
        "size": network.size,
        "classes": network.classes,
        "width": network.width,
        "notes": dict(notes or {}),
    }
    card = validated(ClassifierCard, values, "features")
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(network.state_dict(), temporary)
    with atomic_path(folder / CARD) as temporary:
        temporary.write_text(json.dumps(card.model_dump(), indent=2) + "\n")


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Rise linearly over the first ``warmup`` share of ``steps``, fall to 0 along a cosine."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def _new_training(recipe: ClassifierRecipe, images: Tensor, *, classes: int) -> ClassifierTraining:
    channels, height, width = images.shape[1:]
    if height != width:
        raise ConfigError(f"classifier: wanted square images, got {height} by {width}; set a size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = ImageClassifier(channels, height, classes, recipe.width)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=recipe.weight_decay)
    return ClassifierTraining(network, optimizer)


def _train_epoch(
    state: ClassifierTraining, images: Tensor, labels: Tensor, recipe: ClassifierRecipe
) -> float:
    """One pass in an order of its own; returns the mean loss. A ragged last batch is left out."""
    random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state.epoch)
    batch = min(recipe.batch, len(images))
    per_epoch = len(images) // batch
    order = torch.randperm(len(images), generator=random)[: per_epoch * batch]
    state.network.train()
    total = 0.0
    for position, chosen in enumerate(torch.split(order, batch)):
        step = state.epoch * per_epoch + position
        factor = learning_rate_factor(step, recipe.epochs * per_epoch, recipe.warmup)
        shifted = _shift(images[chosen], random)
        total += _train_step(state, shifted, labels[chosen], recipe, factor)
    state.epoch += 1
    return total / per_epoch


def _train_step(
    state: ClassifierTraining, images: Tensor, labels: Tensor, recipe: ClassifierRecipe, rate: float
) -> float:
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.learning_rate * rate
    _, logits = state.network(images)
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    state.optimizer.step()
    return float(loss.detach())


def _shift(images: Tensor, random: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels along each axis, the border repeated."""
    count, _, height, width = images.shape
    down, right = torch.randint(-1, 2, (2, count, 1), generator=random)
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    image = torch.arange(count)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
