"""Latent diffusion as recorded from the authors' code: trajectories, IEC, caching, guidance.

The recorded numbers are found in the folder that the environment variable IEC_EVAL_ORACLES names.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers import FixedNoise, Recorder, build, oracle, original_ldm, run
from test_oracles import Residuals, assert_recorded
from torch import Tensor

from iec_eval.clock import Clock
from iec_eval.denoising import Condition
from iec_eval.efficiency.deepcache import CachedUNet, DeepCache
from iec_eval.samplers.ddim import DDIM
from iec_eval.schedule import NoiseSchedule

NETS = ("church", "bedroom", "cin256")
SURE = 2.0  # a residual so many times away from the tolerance decides alike everywhere
TOLERANCE = 1e-6


@cache
def network(name: str) -> Any:
    return original_ldm(name)


def schedule(name: str) -> NoiseSchedule:
    betas = oracle("ldm_ddim")[1]["betas"][name]
    return NoiseSchedule.from_betas("scaled_linear", betas["start"], betas["end"])


def condition(name: str) -> Condition:
    """Guided by class for the ImageNet net, as recorded; none for the others."""
    if name != "cin256":
        return Condition()
    labels = oracle("ldm_ddim")[0]["in/cin256/class_ids"]
    table = oracle("ldm_unet_cin256")[0]["ckpt_cond/embedding.weight"]
    states, nothing = table[labels].unsqueeze(1), table[-1].expand(len(labels), 1, -1)
    return Condition({"encoder_hidden_states": states}, {"encoder_hidden_states": nothing}, 1.5)


def trajectory(
    name: str, steps: int, callbacks: list[Any], interval: int = 1
) -> tuple[Tensor, CachedUNet]:
    """All states ``[T + 1, B, C, H, W]``, and the cached network that made them."""
    sampler = build(DDIM, {"steps": steps, "spacing": "ldm"}, schedule(name))
    method = build(DeepCache, {"interval": interval, "cut": 1})
    clock = Clock(steps, method.full_steps(steps, {}))
    cached = method.apply(network(name), clock, {})
    recorder, start = Recorder(), FixedNoise(oracle("ldm_ddim")[0][f"in/{name}/x_T"])
    told = condition(name)
    final = run(cached, sampler, start, [*callbacks, recorder], condition=told, clock=clock)
    return torch.stack([*recorder.states, final]), cached


def released(**options: Any) -> Residuals:
    callback: Residuals = build(Residuals, {"preset": "official_ldm", **options})
    return callback


def assert_decisions(rows: list[list[float]], wanted: Tensor) -> None:
    """Corrections thrown away agree where the recorded residual is not at the tolerance itself."""
    recorded = {(int(row[0]), int(row[1])): row for row in wanted}
    for step, count, residual, thrown in rows:
        row = recorded.get((int(step), int(count)))
        if row is None:
            continue
        near = TOLERANCE / SURE < float(row[2]) < TOLERANCE * SURE
        assert near or thrown == int(row[3])
        if float(row[2]) > 100 * TOLERANCE:
            assert residual == pytest.approx(float(row[2]), rel=1e-2)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("steps", [10, 20])
def test_ddim(name: str, steps: int) -> None:
    tensors, about = oracle("ldm_ddim")
    states, _ = trajectory(name, steps, [])
    assert_recorded(states, tensors[f"out/{name}/ddim{steps}/x"], about)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("steps", [10, 20])
def test_released_iec(name: str, steps: int) -> None:
    tensors, about = oracle("ldm_ddim")
    iec = released()
    states, _ = trajectory(name, steps, [iec])
    assert_recorded(states, tensors[f"out/{name}/implicit{steps}/x"], about)
    assert_decisions(iec.rows, tensors[f"out/{name}/implicit{steps}/residual"])


@pytest.mark.parametrize("name", NETS)
def test_one_correction_of_full_weight(name: str) -> None:
    tensors, about = oracle("ldm_ddim")
    states, _ = trajectory(name, 10, [released(weights=[1.0], tolerance=0.0)])
    assert_recorded(states, tensors[f"out/{name}/implicit_K1_tol0_10/x"], about)


@pytest.mark.parametrize("name", NETS)
def test_deepcache(name: str) -> None:
    tensors, about = oracle("ldm_ddim")
    states, _ = trajectory(name, 20, [], interval=3)
    assert_recorded(states, tensors[f"out/{name}/ddim_cacheN320/x"], about)


@pytest.mark.parametrize("name", NETS)
def test_deepcache_with_released_iec(name: str) -> None:
    """The cache ends with the feature of the last correction, both halves of a guided batch."""
    tensors, about = oracle("ldm_ddim")
    iec = released()
    states, cached = trajectory(name, 20, [iec], interval=3)
    assert_recorded(states, tensors[f"out/{name}/implicit_cacheN320/x"], about)
    assert_decisions(iec.rows, tensors[f"out/{name}/implicit_cacheN320/residual"])
    assert cached.feature is not None
    assert_recorded(cached.feature, tensors[f"out/{name}/implicit_cacheN320/F_last_full"], about)
