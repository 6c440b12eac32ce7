"""Training the feature classifier: it learns, it resumes, it stays small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.metrics.features import ImageClassifier
from iec_eval.training import classifier
from iec_eval.training.classifier import (
    ClassifierRecipe,
    accuracy,
    learning_rate_factor,
    save_features,
    train_classifier,
)

RECIPE = ClassifierRecipe(epochs=4, batch=16, width=4, learning_rate=0.02)


def toy_data(count: int = 70) -> tuple[Tensor, Tensor]:
    """Bright squares in one of three corners of noisy 8x8 images."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 80, (count, 1, 8, 8), generator=random, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = [(0, 0), (0, 5), (5, 2)][label]
        image[0, top : top + 3, left : left + 3] = 255 - 60 * label
    return images, labels


IMAGES, LABELS = toy_data()


def train(folder: Path, recipe: ClassifierRecipe = RECIPE, stop_after: int = 0) -> ImageClassifier:
    def report(epoch: int, loss: float, seconds: float) -> None:
        if epoch == stop_after:
            raise KeyboardInterrupt

    return train_classifier(IMAGES, LABELS, recipe, folder, report=report)


def test_resumed_run_ends_as_the_uninterrupted(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop_after=2)
    torch.rand(5)  # the global generator plays no part
    resumed = train(tmp_path / "stopped").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_finished_run_is_only_read(tmp_path: Path) -> None:
    first = train(tmp_path).state_dict()
    again = train(tmp_path, stop_after=RECIPE.epochs).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_every_epoch_has_its_own_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Tensor] = []

    def record(images: Tensor, random: torch.Generator) -> Tensor:
        batches.append(images)
        return images

    monkeypatch.setattr(classifier, "_shift", record)
    train(tmp_path)
    first, second = torch.cat(batches[:4]), torch.cat(batches[4:8])
    assert first.shape == (64, 1, 8, 8)  # four batches of 16, the ragged rest left out
    assert not torch.equal(first, second)


def test_seed_changes_the_run(tmp_path: Path) -> None:
    other = ClassifierRecipe(**{**RECIPE.__dict__, "seed": 1})
    first, second = train(tmp_path / "a"), train(tmp_path / "b", other)
    assert not torch.equal(first.head.weight, second.head.weight)


def test_it_learns(tmp_path: Path) -> None:
    recipe = ClassifierRecipe(epochs=25, batch=16, width=8, learning_rate=0.02)
    network = train(tmp_path, recipe)
    assert not network.training
    assert accuracy(network, IMAGES, LABELS, batch_size=33) > 0.95


def test_accuracy_counts_every_image() -> None:
    network = ImageClassifier(1, 8, 3, width=4)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    share = float((LABELS == 1).double().mean())
    assert accuracy(network, IMAGES, LABELS, batch_size=32) == pytest.approx(share)


def test_other_recipe_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ConfigError, match="use another folder"):
        train(tmp_path, ClassifierRecipe(epochs=5, batch=16, width=4, learning_rate=0.02))


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "classifier.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CorruptFile, match="delete it"):
        train(tmp_path)


def test_oblong_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="square"):
        train_classifier(
            IMAGES[..., :6], LABELS, RECIPE, tmp_path, report=lambda epoch, loss, seconds: None
        )


def test_tag_must_be_a_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tag"):
        save_features(ImageClassifier(1, 8, 3, width=4), tmp_path, "Not a tag")
    assert not list(tmp_path.iterdir())


def test_default_network_is_small(tmp_path: Path) -> None:
    network = ImageClassifier(channels=3, size=32, classes=100, width=ClassifierRecipe().width)
    assert sum(p.numel() for p in network.parameters()) < 300_000
    save_features(network, tmp_path, "small")
    assert (tmp_path / "features.safetensors").stat().st_size < 1_200_000


def test_shift_moves_by_one_pixel_at_most() -> None:
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    padded = torch.nn.functional.pad(image.float(), (1,) * 4, mode="replicate").byte()
    places = {
        tuple(padded[0, 0, top : top + 4, left : left + 4].flatten().tolist())
        for top in range(3)
        for left in range(3)
    }
    shifted = classifier._shift(image.repeat(200, 1, 1, 1), torch.Generator().manual_seed(0))
    assert {tuple(one.flatten().tolist()) for one in shifted} == places


def test_learning_rate_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.2) for step in range(100)]
    assert factors[19] == 1.0
    assert factors[:20] == sorted(factors[:20])
    assert factors[19:] == sorted(factors[19:], reverse=True)
    assert factors[-1] < 0.001
