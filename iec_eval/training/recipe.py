"""The whole recipe: from images on disk to a model folder like the packaged one.

OUT/unet  OUT/scheduler            the denoiser, as diffusers saves it
OUT/features                       the classifier whose features score it
OUT/reference.safetensors          statistics of the training images
OUT/card.json                      what was done, for the data card
OUT/data.json                      which images, by their hash
OUT/work                           checkpoints; the folder can be deleted at the end
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iec_eval.errors import ConfigError
from iec_eval.images import ImagePreparation, Subset, load_all, open_images
from iec_eval.metrics.features import ClassifierFeatures
from iec_eval.metrics.fid import FID, FIDOptions
from iec_eval.metrics.statistics import FILE, reference_from_images
from iec_eval.storage import content_digest, write_json
from iec_eval.training.classifier import (
    ClassifierRecipe,
    save_features,
    train_classifier,
)
from iec_eval.training.denoiser import TRAIN_TIMESTEPS, DenoiserRecipe, train_denoiser

Say = Callable[[str], None]


def train_folder(
    images: str,
    out: Path,
    *,
    test_images: str | None,
    tag: str,
    preparation: ImagePreparation,
    denoiser: DenoiserRecipe,
    classifier: ClassifierRecipe,
    say: Say,
) -> dict[str, Any]:
    """Train everything that is missing in ``out`` and return the card.

    Raises ConfigError for images without classes, and for others than those that what is there
    was trained on.
    """
    pixels, labels = _labelled(images, preparation)
    _one_data_set(pixels, labels, out / "data.json")
    network = train_classifier(
        pixels, labels, classifier, out / "work", report=_reporter(say, "classifier epoch")
    )
    save_features(network, out / "features", tag, notes=asdict(classifier))
    _save_reference(images, preparation, out, say)
    losses = _train_and_save_denoiser(pixels, labels, denoiser, out, say)
    card = {
        "images": images,
        "preparation": preparation.record(),
        "classes": open_images(images).class_names,
        "denoiser": asdict(denoiser),
        "classifier": asdict(classifier),
        "loss_every_100_steps": [round(loss, 5) for loss in losses],
        "test": _measure_test(test_images, preparation, out) if test_images else None,
    }
    write_json(out / "card.json", card)
    return card


def real_images_fid(images: str, preparation: ImagePreparation, folder: Path, count: int) -> float:
    """FID of the first ``count`` real images against the folder's reference: the floor."""
    network = ClassifierFeatures(folder / "features")
    pixels, _ = load_all(Subset(open_images(images), count), preparation)
    options = FIDOptions(features=str(folder / "features"), reference=str(folder / FILE))
    metric = FID(options)
    metric.prepare(count)
    for part in torch.arange(count).split(500):
        metric.update(network.extract(pixels[part]), part)
    return next(iter(metric.compute().values()))


def _labelled(images: str, preparation: ImagePreparation) -> tuple[Tensor, Tensor]:
    pixels, labels = load_all(open_images(images), preparation)
    if labels is None:
        raise ConfigError(
            f"images {images!r} have no classes; the recipe trains a classifier, so put each "
            "class in a folder of its own"
        )
    return pixels, labels


def _one_data_set(pixels: Tensor, labels: Tensor, record: Path) -> None:
    """Note what is trained on; raises ConfigError if that is not what ``record`` tells."""
    data = {
        "content": content_digest({"pixels": pixels, "labels": labels}),
        "shape": list(pixels.shape),
    }
    known = json.loads(record.read_text()) if record.is_file() else data
    if known != data:
        raise ConfigError(
            f"{record.parent} was trained on other images, or on these prepared otherwise "
            f"({known['shape']} then, {data['shape']} now); use another folder"
        )
    write_json(record, data)


def _save_reference(images: str, preparation: ImagePreparation, out: Path, say: Say) -> None:
    path = out / FILE
    if path.is_file():
        return
    network = ClassifierFeatures(out / "features")
    statistics = reference_from_images(open_images(images), preparation, network, source=images)
    statistics.save(path)
    say(f"reference statistics of {statistics.count} images")


def _train_and_save_denoiser(
    pixels: Tensor, labels: Tensor, recipe: DenoiserRecipe, out: Path, say: Say
) -> list[float]:
    from diffusers import DDPMScheduler

    state = train_denoiser(
        pixels, labels, recipe, out / "work", report=_reporter(say, "denoiser step")
    )
    network: Any = state.average.module
    network.eval().save_pretrained(out / "unet", safe_serialization=True)
    scheduler: Any = DDPMScheduler(num_train_timesteps=TRAIN_TIMESTEPS, beta_schedule="linear")
    scheduler.save_pretrained(out / "scheduler")
    return state.losses


def _measure_test(images: str, preparation: ImagePreparation, out: Path) -> dict[str, Any]:
    network = ClassifierFeatures(out / "features")
    pixels, labels = _labelled(images, preparation)
    predicted = torch.cat([network.extract(part).logits.argmax(1) for part in pixels.split(500)])
    return {
        "images": images,
        "count": len(pixels),
        "classifier_accuracy": float((predicted == labels).double().mean()),
    }


def _reporter(say: Say, what: str) -> Callable[[int, float, float], None]:
    def report(done: int, loss: float, seconds: float) -> None:
        say(f"{what} {done}: loss {loss:.4f}, {seconds:.2f} s each")

    return report
