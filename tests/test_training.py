"""The recipe: resuming changes nothing, and a folder it made is a model one can study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from iec_eval.cli.main import cli
from iec_eval.errors import ConfigError
from iec_eval.training.denoiser import (
    DenoiserRecipe,
    build_network,
    learning_rate_factor,
    train_denoiser,
)

TINY = DenoiserRecipe(steps=6, batch=4, warmup=2, channels=(8, 16), attention_level=1)


def quiet(done: int, loss: float, seconds: float) -> None:
    pass


def tiny_data() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 8, 8), generator=random, dtype=torch.uint8)
    return images, torch.arange(12) % 3


class Interrupted(Exception):
    pass


def test_a_resumed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    images, labels = tiny_data()
    whole = train_denoiser(images, labels, TINY, tmp_path / "whole", report=quiet, save_every=2)
    steps = []

    def stop_at_five(*args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise Interrupted
        return original(*args, **kwargs)

    from iec_eval.training import denoiser

    original = denoiser._train_step
    monkeypatch.setattr(denoiser, "_train_step", stop_at_five)
    with pytest.raises(Interrupted):
        train_denoiser(images, labels, TINY, tmp_path / "cut", report=quiet, save_every=2)
    monkeypatch.undo()
    resumed = train_denoiser(images, labels, TINY, tmp_path / "cut", report=quiet, save_every=2)
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name
    assert resumed.step == 6


def test_another_recipe_does_not_continue_a_checkpoint(tmp_path):
    images, labels = tiny_data()
    train_denoiser(images, labels, TINY, tmp_path, report=quiet)
    other = DenoiserRecipe(**{**TINY.__dict__, "learning_rate": 0.5})
    with pytest.raises(ConfigError, match="learning_rate"):
        train_denoiser(images, labels, other, tmp_path, report=quiet)


def test_more_steps_do_not_change_the_learning_rate_before_the_decay():
    short, long = DenoiserRecipe(steps=1000), DenoiserRecipe(steps=2000)
    before = [learning_rate_factor(step, short) for step in range(800)]
    assert before == [learning_rate_factor(step, long) for step in range(800)]
    assert learning_rate_factor(999, short) == pytest.approx(1 / 200)


def test_label_dropout_uses_a_class_of_its_own():
    network = build_network(TINY, (1, 8, 8), classes=3)
    assert network.config.num_class_embeds == 4


def image_folder(root: Path) -> Path:
    images, labels = tiny_data()
    for index in range(96):
        folder = root / f"class{int(labels[index % 12])}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index % 12, 0].numpy()).save(folder / f"{index}.png")
    return root


@pytest.mark.slow
def test_the_recipe_makes_a_folder_that_studies_can_use(tmp_path):
    images = image_folder(tmp_path / "images")
    arguments = ["train", str(images), str(tmp_path / "model"), "--test", str(images)]
    options = ["--tag", "tiny", "--steps", "5", "--epochs", "1", "--samples", "64"]
    result = CliRunner().invoke(cli, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "fid-tiny of 64 real test images, the floor" in result.output
    again = CliRunner().invoke(cli, [*arguments, *options], catch_exceptions=False)
    assert again.output.splitlines()[-1] == result.output.splitlines()[-1]
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"unet", "scheduler", "features", "reference.safetensors", "card.json"} <= names
    # networks do not depend on the size, so checkpoints would fit; the reference would not
    larger = CliRunner().invoke(cli, [*arguments, *options, "--size", "32"])
    assert larger.exit_code == 2
    assert "was trained on other images, or on these prepared otherwise" in larger.output
