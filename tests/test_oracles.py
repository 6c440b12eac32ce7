"""Numbers recorded from the authors' code, reproduced through our own loop.

They are found in the folder that the environment variable IEC_EVAL_ORACLES names.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FixedNoise, Recorder, build, ddim, oracle, original_ddpm, run, trajectory
from torch import Tensor

from iec_eval.callbacks.iec import IEC, Correction
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.efficiency.deepcache import CachedUNet, DeepCache
from iec_eval.samplers.ddim import DDIM, ddim_timesteps
from iec_eval.schedule import NoiseSchedule
from iec_eval.storage import load_weights

Plan = tuple[str, int]
QUAD10, QUAD20, UNIFORM10, UNIFORM20 = (
    ("quad", 10),
    ("quad", 20),
    ("uniform", 10),
    ("uniform", 20),
)


@cache
def network() -> Any:
    tensors, about = oracle("ddpm_unet")
    state = {key[5:]: value for key, value in tensors.items() if key.startswith("ckpt/")}
    return original_ddpm(state, about["config"])


class Residuals(IEC):
    """IEC that keeps a row (step, correction, residual, thrown away) for each correction."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.rows: list[list[float]] = []

    def on_correction(self, step: Step, correction: Correction) -> None:
        count = 1 + sum(row[0] == step.index for row in self.rows)
        thrown = 1 - int(correction.applied[0])
        self.rows.append([step.index, count, float(correction.residual[0]), thrown])


def official_iec(tolerance: str, corrections: int = 1) -> Residuals:
    options = {
        "preset": "official_ddim",
        "corrections": corrections,
        "relaxation_schedule": "geometric_from_half",
        "tolerance": {"tol1e-3": 1e-3, "tol0": 0.0}[tolerance],
    }
    callback: Residuals = build(Residuals, options)
    return callback


def assert_recorded(found: Tensor, wanted: Tensor, about: dict[str, Any]) -> None:
    """Within the stated tolerance: absolute, or a share of the largest value."""
    tolerance = about["tolerance"]
    assert found.shape == wanted.shape
    limit = max(tolerance["abs"], tolerance["rel_to_max"] * float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, atol=limit, rtol=0)


def assert_residuals(rows: list[list[float]], wanted: Tensor) -> None:
    """Steps, corrections and decisions exactly; residuals to 1 % where they are not rounding."""
    found = torch.tensor(rows)
    assert torch.equal(found[:, [0, 1, 3]], wanted[:, [0, 1, 3]])
    seen = wanted[:, 2] > 1e-5
    torch.testing.assert_close(found[seen, 2], wanted[seen, 2], rtol=1e-2, atol=0)


# --- networks ---------------------------------------------------------------------------------


@torch.no_grad()
def test_ddpm_network() -> None:
    tensors, about = oracle("ddpm_unet")
    x, limit = tensors["in/x"], about["tolerance"]["abs"]
    for timestep, wanted in zip(tensors["in/t"], tensors["out/eps"], strict=True):
        eps = network()(x, timestep.expand(len(x))).sample
        torch.testing.assert_close(eps, wanted, atol=limit, rtol=0)
    eps = network()(x, tensors["in/t_mixed"]).sample
    torch.testing.assert_close(eps, tensors["out/eps_mixed"], atol=limit, rtol=0)


@torch.no_grad()
def test_ddpm_checkpoint_file() -> None:
    tensors, about = oracle("ddpm_ckpt")
    state = load_weights(Path(os.environ["IEC_EVAL_ORACLES"]) / "ddpm_ckpt.ckpt")
    assert len(state) == about["key_count"]
    loaded = original_ddpm(state, about["config"])
    for timestep, wanted in zip(tensors["in/t"], tensors["out/eps"], strict=True):
        eps = loaded(tensors["in/x"], timestep.expand(len(wanted))).sample
        torch.testing.assert_close(eps, wanted, atol=about["tolerance"]["abs"], rtol=0)


# --- DDIM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing", "steps"), [QUAD10, QUAD20, UNIFORM10, UNIFORM20])
def test_ddim_trajectory(spacing: str, steps: int) -> None:
    tensors, about = oracle("ddim_ddpm")
    name = f"out/{spacing}{steps}"
    sampler, recorder = ddim(steps=steps, spacing=spacing), Recorder()
    final = run(network(), sampler, FixedNoise(tensors["in/x_T"]), [recorder])
    states = torch.stack([*recorder.states, final])
    assert_recorded(states, tensors[f"{name}/x"], about)
    abar = torch.tensor([sampler.schedule.abar(int(t)) for t in sampler.timesteps])
    abar = abar.float().view(-1, 1, 1, 1, 1)
    x0 = (states[:-1] - (1 - abar).sqrt() * torch.stack(recorder.predictions)) / abar.sqrt()
    assert_recorded(x0, tensors[f"{name}/x0_pred"], about)


@pytest.mark.parametrize(
    ("spacing", "steps"), [QUAD10, QUAD20, ("quad", 50), ("quad", 100), UNIFORM10, UNIFORM20,
                           ("uniform", 100)]
)  # fmt: skip
def test_ddim_timesteps(spacing: str, steps: int) -> None:
    tensors, _ = oracle("ddim_ddpm")
    wanted = tensors[f"out/{spacing}{steps}/timesteps"].tolist()
    assert list(ddim_timesteps(steps, spacing, 1000)) == wanted


LDM_SCHEDULES = {
    "church": NoiseSchedule.from_betas("scaled_linear", 1.5e-3, 1.55e-2),
    "bedroom": NoiseSchedule.from_betas("scaled_linear", 1.5e-3, 1.95e-2),
    "cin256": NoiseSchedule.from_betas("scaled_linear", 1.5e-3, 1.95e-2),
    "sd": NoiseSchedule.from_betas("scaled_linear", 8.5e-4, 1.2e-2),
}


def test_ldm_timesteps() -> None:
    tensors, _ = oracle("ldm_ddim")
    recorded = {int(key[15:]): tensors[key] for key in tensors if key.startswith("out/timesteps/T")}
    assert len(recorded) > 3
    for steps, wanted in recorded.items():
        if 1000 % steps:
            assert len(wanted) > steps  # what is refused
        else:
            assert list(ddim_timesteps(steps, "ldm", 1000)) == wanted.tolist()


@pytest.mark.parametrize("name", LDM_SCHEDULES)
def test_ldm_cumulative_products(name: str) -> None:
    """The whole schedule; at every step, of the state it starts from and of the one it makes."""
    tensors, _ = oracle("ldm_ddim")
    schedule = LDM_SCHEDULES[name]
    if f"out/{name}/alphas_cumprod" in tensors:
        wanted = tensors[f"out/{name}/alphas_cumprod"]
        torch.testing.assert_close(schedule.alphas_cumprod.float(), wanted, rtol=1e-6, atol=0)
    runs = {"sd": ("plms_sd", "plms")}.get(name, ("ldm_ddim", f"{name}/ddim"))
    for steps in (10, 20):
        sampler = build(DDIM, {"steps": steps, "spacing": "ldm"}, schedule)
        recorded = oracle(runs[0])[0]
        abar = torch.tensor(sampler._abar)
        start, made = (recorded[f"out/{runs[1]}{steps}/{key}"] for key in ("abar", "abar_prev"))
        torch.testing.assert_close(abar[:-1], start, rtol=1e-6, atol=0)
        torch.testing.assert_close(abar[1:], made, rtol=1e-6, atol=0)


def test_cumulative_products() -> None:
    tensors, _ = oracle("ddim_ddpm")
    schedule = NoiseSchedule.from_betas()
    ours = torch.tensor([schedule.abar(t) for t in range(-1, 1000)])
    # theirs is a running product in float32
    torch.testing.assert_close(ours.float(), tensors["out/abar"], rtol=1e-5, atol=0)


# --- IEC --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", ["tol1e-3", "tol0"])
@pytest.mark.parametrize(("spacing", "steps"), [QUAD10, QUAD20, UNIFORM20])
def test_iec_trajectory(spacing: str, steps: int, tolerance: str) -> None:
    check_iec(spacing, steps, tolerance, 1, f"out/{spacing}{steps}/{tolerance}")


@pytest.mark.parametrize("tolerance", ["tol1e-3", "tol0"])
@pytest.mark.parametrize("corrections", [2, 3])
def test_iec_with_more_corrections(tolerance: str, corrections: int) -> None:
    check_iec("quad", 10, tolerance, corrections, f"out/quad10/{tolerance}_K{corrections}")


def check_iec(spacing: str, steps: int, tolerance: str, corrections: int, name: str) -> None:
    tensors, about = oracle("iec_ddim")
    iec = official_iec(tolerance, corrections)
    sampler = ddim(steps=steps, spacing=spacing)
    states = trajectory(network(), sampler, FixedNoise(tensors["in/x_T"]), [iec])
    assert_recorded(states, tensors[f"{name}/x"], about)
    assert_residuals(iec.rows, tensors[f"{name}/residual"])


def test_iec_at_a_hundred_steps() -> None:
    tensors, about = oracle("iec_ddim")
    name, iec, clock = "out/quad100/tol0", official_iec("tol0"), Clock(100)
    sampler = ddim(steps=100, spacing="quad")
    start = FixedNoise(tensors["in/x_T"])
    states = trajectory(network(), sampler, start, [iec], clock=clock)
    assert clock.evaluations.full == 2 * 100 * len(tensors["in/x_T"])
    assert_recorded(states[-1], tensors[f"{name}/x_final"], about)
    assert_recorded(states[94:], tensors[f"{name}/x_i95_to_i100"], about)
    found, wanted = torch.tensor([row[2] for row in iec.rows]), tensors[f"{name}/residual"]
    seen = wanted > 1e-5
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-2, atol=0)
    assert float(found[~seen].max()) < 2e-5


# --- DeepCache --------------------------------------------------------------------------------


class AffineCache(CachedUNet):
    """A cache that scales and shifts what it recalls, per step and channel."""

    scale: Tensor
    shift: Tensor

    def _recall(self) -> Tensor:
        step = self._clock.step
        scale, shift = self.scale[step], self.shift[step]
        return super()._recall() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def deepcache_run(
    sampler: Any, start: Tensor, interval: int, branch: int, callbacks: list[Any]
) -> tuple[Tensor, Recorder]:
    method: DeepCache = build(DeepCache, {"interval": interval, "cut": branch + 2})
    clock = Clock(len(sampler.timesteps), method.full_steps(len(sampler.timesteps), {}))
    cached = method.apply(network(), clock, {})
    recorder = Recorder(cached)
    final = run(cached, sampler, FixedNoise(start), [*callbacks, recorder], clock=clock)
    return torch.stack([*recorder.states, final]), recorder


@pytest.mark.parametrize("interval", [3, 5])
@pytest.mark.parametrize("mode", ["noiec", "iec_tol1e-3", "iec_tol0"])
def test_deepcache_trajectory(interval: int, mode: str) -> None:
    tensors, about = oracle("deepcache_ddpm")
    name = f"out/quad20/N{interval}/{mode}"
    full = build(DeepCache, {"interval": interval, "cut": 4}).full_steps(20, {})
    assert list(full) == tensors[f"in/N{interval}/full_steps"].tolist()
    iec = [] if mode == "noiec" else [official_iec(mode.removeprefix("iec_"))]
    sampler = ddim(steps=20, spacing="quad")
    states, recorder = deepcache_run(sampler, tensors["in/x_T"], interval, 2, iec)
    assert_recorded(states, tensors[f"{name}/x"], about)
    if f"{name}/F" in tensors:
        limit = about["tolerance"]["F_abs"]
        found = torch.stack(recorder.features)
        torch.testing.assert_close(found, tensors[f"{name}/F"], atol=limit, rtol=0)
    if iec:
        assert_residuals(iec[0].rows, tensors[f"{name}/residual"])


def test_features_are_recorded_for_all_modes() -> None:
    tensors, _ = oracle("deepcache_ddpm")
    assert {key for key in tensors if key.startswith("out/quad20") and key.endswith("/F")} == {
        "out/quad20/N5/noiec/F",
        "out/quad20/N5/iec_tol0/F",
    }


@pytest.mark.parametrize("branch", [0, 1, 3, 5])
@pytest.mark.parametrize("mode", ["noiec", "iec_tol0"])
def test_deepcache_at_other_branches(branch: int, mode: str) -> None:
    tensors, about = oracle("deepcache_ddpm")
    iec = [] if mode == "noiec" else [official_iec("tol0")]
    sampler = ddim(steps=10, spacing="quad")
    states, _ = deepcache_run(sampler, tensors["in/x_T"], 3, branch, iec)
    assert_recorded(states, tensors[f"out/branch{branch}/quad10/N3/{mode}/x"], about)


@pytest.mark.parametrize("branch", range(11))
@torch.no_grad()
def test_single_cached_forward(branch: int) -> None:
    tensors, about = oracle("deepcache_ddpm")
    clock = Clock(2, [0])
    cached = CachedUNet(network(), branch + 2, clock)
    eps = cached(tensors["in/single/x_full"], tensors["in/single/t_full"])
    torch.testing.assert_close(eps, tensors["out/single/eps_full"], atol=2e-5, rtol=0)
    shape = tuple(about["branches"]["table"][str(branch)]["F"])
    assert cached.feature is not None
    assert tuple(cached.feature.shape[1:]) == shape
    wanted = tensors[f"out/single/branch{branch}/F"]
    torch.testing.assert_close(cached.feature, wanted, atol=2e-5, rtol=0)
    clock.step, clock.full = 1, False
    eps = cached(tensors["in/single/x_cached"], tensors["in/single/t_cached"])
    wanted = tensors[f"out/single/branch{branch}/eps_cached"]
    torch.testing.assert_close(eps, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["affine", "quirk_b1", "quirk_b1 with IEC"])
def test_affine_on_the_cached_feature(name: str) -> None:
    tensors, about = oracle("deepcache_ddpm")
    clock = Clock(20, range(0, 20, 5))
    cached = AffineCache(network(), 4, clock)
    if name == "affine":
        cached.scale, cached.shift = tensors["in/affine/a"], tensors["in/affine/b"]
    else:
        cached.scale = cached.shift = torch.ones(20, 64)
    iec = [official_iec("tol1e-3")] if "IEC" in name else []
    sampler = ddim(steps=20, spacing="quad")
    states = trajectory(cached, sampler, FixedNoise(tensors["in/x_T"]), iec, clock=clock)
    mode = "iec_tol1e-3" if iec else "noiec"
    assert_recorded(states, tensors[f"out/{name.split()[0]}/quad20/N5/{mode}/x"], about)
