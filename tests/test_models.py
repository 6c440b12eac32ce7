"""Models from folders: what the configuration says is what is built, and weights fit exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Toy
from helpers import build
from safetensors.torch import load_file, save_file

from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser
from iec_eval.errors import ConfigError, CorruptFile, IecEvalError, Incompatible
from iec_eval.models.base import to_uint8
from iec_eval.models.unet import FashionMNIST, UNet
from iec_eval.testing import check_model

SCHEDULER = "scheduler/scheduler_config.json"
NETWORK = "unet/config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    """A copy of the toy model, to be changed."""
    for part in ("unet", "scheduler"):
        shutil.copytree(toy.folder / part, tmp_path / part)
    return tmp_path


def model(folder: Path, **options: Any) -> UNet:
    found: UNet = build(UNet, {"path": str(folder), **options})
    return found


def change(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None as value removes the key."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


# --- labels and guidance ----------------------------------------------------------------------


def test_the_label_is_a_function_of_the_index(toy: Toy) -> None:
    labels = model(toy.folder).condition([0, 1, 4, 7, 50_001]).inputs["class_labels"]
    assert labels.tolist() == [0, 1, 0, 3, 1]


def test_one_label_for_all(toy: Toy) -> None:
    labels = model(toy.folder, label=2).condition([0, 1, 7]).inputs["class_labels"]
    assert labels.tolist() == [2, 2, 2]


def test_the_class_that_means_none_is_no_class(toy: Toy) -> None:
    found = model(toy.folder, unconditional_class=3)
    assert found.classes == 3
    assert found.condition(range(5)).inputs["class_labels"].tolist() == [0, 1, 2, 0, 1]


def test_a_network_without_classes_is_told_nothing(folder: Path) -> None:
    change(folder / NETWORK, num_class_embeds=None)
    condition = model(folder).condition([0, 1])
    assert (model(folder).classes, dict(condition.inputs), condition.guided) == (0, {}, False)


def test_guidance_runs_one_doubled_batch(toy: Toy) -> None:
    scale = 2.5
    guided = model(toy.folder, guidance=scale, unconditional_class=3)
    network, calls = guided.load(), list[int]()
    network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    condition, clock = guided.condition([0, 1]), Clock(1)
    sample = torch.randn(2, *guided.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = Denoiser(network, condition, clock)(sample, 40)
        when = torch.full((2,), 40.0)
        labelled = network(sample, when, class_labels=torch.tensor([0, 1])).sample
        unlabelled = network(sample, when, class_labels=torch.tensor([3, 3])).sample
    wanted = unlabelled + scale * (labelled - unlabelled)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert calls[0] == 4
    assert clock.evaluations.full == 2  # an evaluation of each image, at twice the price


def test_guidance_of_one_is_none_and_costs_nothing(toy: Toy) -> None:
    condition = model(toy.folder, guidance=1.0, unconditional_class=3).condition([0])
    assert not condition.guided


@pytest.mark.parametrize("options", [{}, {"unconditional_class": 0}])
def test_guidance_needs_classes_and_the_one_for_none(folder: Path, options: Any) -> None:
    if options:
        change(folder / NETWORK, num_class_embeds=None)
    with pytest.raises(Incompatible, match="guidance needs a class-conditional network"):
        model(folder, guidance=2.0, **options)


def test_class_options_without_effect_are_refused(folder: Path, toy: Toy) -> None:
    with pytest.raises(ConfigError, match="must be the last of the network's 4 classes, 3, got 1"):
        model(toy.folder, unconditional_class=1)
    change(folder / NETWORK, num_class_embeds=None)
    for options in ({"labels": "labels.txt"}, {"unconditional_class": 3}):
        with pytest.raises(Incompatible, match="knows no classes"):
            model(folder, **options)


def test_a_label_outside_is_refused(toy: Toy) -> None:
    with pytest.raises(ConfigError, match="label 4: the model has 4 classes"):
        model(toy.folder, label=4)


# --- decoding ---------------------------------------------------------------------------------


def test_decoding_rounds_to_nearest(toy: Toy) -> None:
    # 127.5 (v + 1): the thresholds between two values lie at half numbers
    values = [-1.0, -0.999, 0.0, 0.9999, 1.0, -3.0, 7.0, 2 * 100.49 / 255 - 1, 2 * 100.51 / 255 - 1]
    wanted = [0, 0, 128, 255, 255, 0, 255, 100, 101]
    assert to_uint8(torch.tensor(values)).tolist() == wanted
    latents = torch.tensor(values[:4]).expand(1, 1, 1, 4)
    assert model(toy.folder).decode(latents).flatten().tolist() == wanted[:4]


def test_every_byte_survives_the_way_there_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)


# --- structure, schedule, identity ------------------------------------------------------------


def test_it_keeps_the_contract(toy: Toy) -> None:
    check_model(UNet, {"path": str(toy.folder)})


def test_the_skeleton_is_the_network_without_its_weights(toy: Toy) -> None:
    found = model(toy.folder)
    skeleton, network = found.skeleton(), found.load()
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    shapes = [
        {name: (tuple(t.shape), t.dtype) for name, t in one.state_dict().items()}
        for one in (skeleton, network)
    ]
    assert shapes[0] == shapes[1]
    assert str(skeleton) == str(network)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_the_weights_are_those_of_the_file(toy: Toy) -> None:
    network, stored = model(toy.folder).load(), load_file(toy.weights)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in stored.items())


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_schedule_is_that_of_diffusers(folder: Path, kind: str) -> None:
    from diffusers import DDPMScheduler

    made = DDPMScheduler(200, beta_start=0.001, beta_end=0.03, beta_schedule=kind)
    made.save_pretrained(folder / "scheduler")
    schedule = model(folder).schedule
    assert len(schedule) == 200
    wanted = made.alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas_cumprod, wanted, rtol=1e-5, atol=0)
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.abar(-1) == 1.0


@pytest.mark.parametrize(
    ("stored", "meant"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "sample")]
)
def test_the_kind_of_prediction_is_translated(folder: Path, stored: str, meant: str) -> None:
    change(folder / SCHEDULER, prediction_type=stored)
    assert model(folder).prediction == meant


def test_a_network_may_see_oblong_images(folder: Path) -> None:
    change(folder / NETWORK, sample_size=[8, 16])
    assert model(folder).image_shape == (1, 8, 16)


@pytest.mark.parametrize("name", [NETWORK, SCHEDULER, WEIGHTS])
def test_the_identity_changes_with_each_file(folder: Path, toy: Toy, name: str) -> None:
    before = model(folder).identity()
    assert before == model(toy.folder).identity()  # wherever the folder is
    content = bytearray((folder / name).read_bytes())
    content += b"\n"
    (folder / name).write_bytes(content)
    after = model(folder).identity()
    assert {key for key in before if before[key] != after[key]} == {name}


def test_the_packaged_model_has_ten_classes_and_one_for_none() -> None:
    found = build(FashionMNIST)
    assert (found.classes, found.image_shape, found.prediction) == (10, (1, 16, 16), "epsilon")
    condition = build(FashionMNIST, {"guidance": 2.0}).condition([3, 13])
    assert condition.inputs["class_labels"].tolist() == [3, 3]
    assert condition.unconditional is not None
    assert condition.unconditional["class_labels"].tolist() == [10, 10]
    assert build(FashionMNIST).load().state_dict().keys() == found.skeleton().state_dict().keys()


# --- what can be wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        (NETWORK, {"_class_name": "UNet2DConditionModel"}, Incompatible, "wanted a UNet2DModel"),
        (NETWORK, {"sample_size": None}, ConfigError, "must say in_channels and sample_size"),
        (NETWORK, {"in_channels": "one"}, ConfigError, "got 'one' and 8"),
        (SCHEDULER, {"prediction_type": "flow"}, Incompatible, "prediction_type 'flow', wanted"),
        (SCHEDULER, {"beta_schedule": "wavy"}, ConfigError, "describes no noise schedule .*wavy"),
    ],
)
def test_a_wrong_configuration_is_named(
    folder: Path, name: str, values: Any, error: type[IecEvalError], message: str
) -> None:
    change(folder / name, **values)
    with pytest.raises(error, match=message) as caught:
        model(folder)
    assert str(folder) in str(caught.value)


def test_an_impossible_network_is_named(folder: Path) -> None:
    change(folder / NETWORK, down_block_types=["DownBlock2D"])
    with pytest.raises(ConfigError, match=r"unet/config\.json: .* describes no UNet2DModel"):
        model(folder).skeleton()


@pytest.mark.parametrize("name", [NETWORK, SCHEDULER])
@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("3", "wanted a JSON object, got int")]
)
def test_a_damaged_configuration_is_named(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(CorruptFile, match=rf"{name}: {message}"):
        model(folder)


@pytest.mark.parametrize("name", [NETWORK, SCHEDULER, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}.* not found"):
        model(folder).identity()


def damaged(folder: Path, how: str) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    if how == "missing key":
        del tensors["conv_in.bias"]
    elif how == "wrong shape":
        tensors["conv_in.bias"] = torch.zeros(9)
    elif how == "unknown keys":
        tensors |= {name: torch.zeros(1) for name in ("z4", "z3", "z2", "z1")}
    save_file(tensors, path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "pickle":
        torch.save({"weights": np.zeros(2)}, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing key", r"key 'conv_in\.bias' is missing, wanted shape \(8,\)"),
        ("wrong shape", r"key 'conv_in\.bias' has shape \(9,\), wanted \(8,\)"),
        ("unknown keys", r"unknown keys \['z1', 'z2', 'z3'\], 4 in all"),
        ("truncated", "cannot be read .* wanted a whole safetensors file"),
        ("pickle", "cannot be read .* files that contain pickled code are refused"),
    ],
)
def test_weights_must_fit_exactly(folder: Path, how: str, message: str) -> None:
    damaged(folder, how)
    with pytest.raises(CorruptFile, match=message) as caught:
        model(folder).load()
    assert WEIGHTS in str(caught.value)
