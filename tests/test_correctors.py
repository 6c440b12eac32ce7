"""The free rivals of IEC: epsilon scaling, shifted timesteps, the scalar that IEC applies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import SCHEDULE, ConvNet, FixedNoise, Spy, build, ddim, run, trajectory
from torch import Tensor, nn

from iec_eval.calibration import Bench
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.epsilon_scaling import EpsilonScaling
from iec_eval.callbacks.iec import IEC
from iec_eval.callbacks.look_ahead import LookAhead
from iec_eval.callbacks.scale_matched import ScaleMatched
from iec_eval.callbacks.time_shift import TimeShift, shifted
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser, Step
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Draw, Noise
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.samplers.ddim import ddim_coefficients
from iec_eval.samplers.diffusers import DiffusersSampler
from iec_eval.samplers.plms import PLMS
from iec_eval.testing import TinyModel

SHAPE = (3, 6, 6)


def start(count: int = 3) -> FixedNoise:
    return FixedNoise(Noise(5, range(count), SHAPE).initial().double())


def bench_on(network: nn.Module, sampler: Sampler, clock: Clock, images: int = 4) -> Bench:
    """Calibration of a float32 network on 3x8x8 images."""
    return Bench(network, clock, TinyModel(), sampler, seed=2, images=images)


def calibration_noise(images: int = 4) -> Tensor:
    """The x_T that a bench of these tests starts from."""
    return Noise(2, range(images), TinyModel().shape, calibration=True).initial()


# --- epsilon scaling --------------------------------------------------------------------------


def test_epsilon_scaling_divides_by_a_line_in_the_steps_left() -> None:
    network, sampler, noise = ConvNet(strength=2.0).double(), ddim(steps=5), start()
    scaling = build(EpsilonScaling, {"factor": 0.9, "slope": 0.1})
    ours = run(network, sampler, noise, [scaling])
    x = noise.initial()
    for index, divisor in enumerate([1.4, 1.3, 1.2, 1.1, 1.0]):
        with torch.no_grad():
            eps = network(x, torch.full((3,), sampler.timesteps[index])) / divisor
        a, b = ddim_coefficients(*sampler._abar[index : index + 2])
        x = a * x + b * eps
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)


def test_epsilon_scaling_refuses_what_is_no_scaling_of_noise() -> None:
    with pytest.raises(ConfigError, match=r"falls to -0.2 in 12 steps"):
        build(EpsilonScaling, {"factor": 1.0, "slope": -0.1}).check(ddim(steps=12), Clock(12))
    velocity = build(DiffusersSampler, {"prediction": "v", "steps": 4}, SCHEDULE)
    with pytest.raises(Incompatible, match="this run predicts v"):
        build(EpsilonScaling).check(velocity, Clock(4))


@pytest.mark.parametrize("cls", [IEC, LookAhead])
def test_what_averages_noise_refuses_what_is_no_noise(cls: type[Any]) -> None:
    """The average of two v, seen from the first sample, is not the noise of eq. 10's average."""
    for kind in ("v", "sample"):
        other = build(DiffusersSampler, {"prediction": kind, "steps": 4}, SCHEDULE)
        with pytest.raises(Incompatible, match=f"this run predicts {kind}"):
            build(cls).check(other, Clock(4))
    flow = {"scheduler": "FlowMatchEulerDiscreteScheduler", "prediction": "flow", "steps": 4}
    build(cls).check(build(DiffusersSampler, flow, SCHEDULE), Clock(4))
    build(IEC, {"weights": []}).check(other, Clock(4))  # which corrects nothing


# --- shifted timesteps ------------------------------------------------------------------------


def test_a_forward_sample_is_given_its_own_timestep() -> None:
    """Noise of the variance that a timestep prescribes: that timestep is found, in the window."""
    noise = Noise(1, range(1), (3, 64, 64)).initial().double()
    noise = noise / noise.std()
    wanted = [300, 420, 500, 560, 900]
    variances = torch.stack([1 - SCHEDULE.alphas_cumprod[t] for t in wanted])
    samples = variances.sqrt().view(-1, 1, 1, 1) * noise
    assert shifted(samples, 500, 200, SCHEDULE).tolist() == [400, 420, 500, 560, 600]
    assert shifted(samples, 500, 0, SCHEDULE).tolist() == [500] * 5


def test_the_window_ends_where_the_timesteps_do() -> None:
    quiet, loud = torch.full((1, 3, 4, 4), 0.1), 5 * Noise(1, range(1), SHAPE).initial()
    assert shifted(quiet, 10, 100, SCHEDULE).tolist() == [0]
    assert shifted(loud, 990, 100, SCHEDULE).tolist() == [999]


def test_each_image_is_evaluated_once_at_its_own_timestep() -> None:
    """By hand: the shifted timestep for the network, the step's own for the sampler."""
    network, sampler, noise = ConvNet(strength=2.0).double(), ddim(steps=6), start()
    noise = FixedNoise(noise.initial() * torch.tensor([0.7, 1.0, 1.1]).view(-1, 1, 1, 1))
    clock = Clock(6)
    callback = build(TimeShift, {"window": 300, "cutoff": 200})
    ours = run(network, sampler, noise, [callback], clock=clock)
    x, moved = noise.initial(), 0
    for index, own in enumerate(sampler.timesteps):
        when = torch.full((3,), int(own))
        if index > 0 and own > 200:
            when = torch.tensor([nearest(row, int(own), 150) for row in x])
            moved += int((when != int(own)).sum())
        with torch.no_grad():
            eps = network(x, when)
        a, b = ddim_coefficients(*sampler._abar[index : index + 2])
        x = a * x + b * eps
    assert moved > 3
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-10)
    assert (clock.evaluations.full, clock.evaluations.cached) == (18, 0)


def nearest(image: Tensor, own: int, reach: int) -> int:
    """The timestep near ``own`` whose noise variance is nearest to the image's."""
    variance = float(((image - image.mean()) ** 2).sum() / (image.numel() - 1))
    window = range(max(own - reach, 0), min(own + reach, 999) + 1)
    return min(window, key=lambda t: abs(variance - 1 + SCHEDULE.abar(t)))


def test_guided_rows_are_shifted_alike() -> None:
    seen: list[Tensor] = []

    def network(sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        seen.append(timestep)
        return sample

    condition = Condition({"label": torch.ones(3)}, {"label": torch.zeros(3)}, 2.0)
    sizes = torch.tensor([0.8, 0.9, 1.0]).view(-1, 1, 1, 1)
    noise = FixedNoise(sizes * start().initial())
    callback = build(TimeShift, {"window": 1000, "cutoff": 0})
    run(network, ddim(steps=6), noise, [callback], condition=condition)  # type: ignore[arg-type]
    assert all(torch.equal(when[:3], when[3:]) for when in seen)
    assert any(len(when.unique()) > 1 for when in seen)


def test_plms_shifts_its_evaluation_at_the_sample() -> None:
    sampler, clock = build(PLMS, {"steps": 4}, SCHEDULE), Clock(4)
    spy = Spy(ConvNet(), clock)
    callback = build(TimeShift, {"window": 400, "cutoff": 0})
    callback.check(sampler, clock)
    noise = FixedNoise(0.5 * Noise(5, [0], SHAPE).initial())
    run(spy, sampler, noise, [callback], clock=clock)
    when = [call[3] for call in spy.calls]
    assert when[:2] == list(sampler.timesteps[:2]), "the first step is not shifted"
    assert all(a != b for a, b in zip(when[2:4], sampler.timesteps[1:3], strict=True))


def test_a_sampler_that_may_rescale_is_refused() -> None:
    sampler = build(DiffusersSampler, {"steps": 4}, SCHEDULE)
    with pytest.raises(Incompatible, match="time-shift: sampler diffusers may rescale"):
        build(TimeShift).check(sampler, Clock(4))


# --- who makes the step's evaluation ----------------------------------------------------------


class Zero(DenoisingCallback):
    """Makes the evaluation of odd steps: nothing."""

    name = "zero"

    def evaluate(self, step: Step) -> Tensor | None:
        return torch.zeros_like(step.sample) if step.index % 2 else None

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        return prediction


class Stubborn(Sampler):
    """Asks the network itself."""

    name = "stubborn"
    timesteps = (9, 4)

    def evaluate(self, state: State, step: Step) -> tuple[State, Tensor]:
        return state, step.predict(state.sample)

    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        return State(state.sample - prediction)


def test_a_callback_may_make_the_evaluation_or_leave_it() -> None:
    network, sampler, noise, clock = ConvNet().double(), ddim(steps=4), start(), Clock(4)
    states = trajectory(network, sampler, noise, [Zero(BaseOptions())], clock=clock)
    for index in range(4):
        a, b = ddim_coefficients(*sampler._abar[index : index + 2])
        with torch.no_grad():
            eps = network(states[index], torch.full((3,), sampler.timesteps[index]))
        torch.testing.assert_close(states[index + 1], a * states[index] + (1 - index % 2) * b * eps)
    assert clock.evaluations.full == 6


def test_one_callback_alone_may() -> None:
    with pytest.raises(Incompatible, match="zero and time-shift each make"):
        run(ConvNet(), ddim(steps=4), start(), [Zero(BaseOptions()), build(TimeShift)])


def test_a_sampler_that_does_not_ask_is_told() -> None:
    sampler = Stubborn(BaseOptions(), SCHEDULE)
    run(ConvNet().double(), sampler, start())
    with pytest.raises(Incompatible, match="stubborn makes its own evaluations, so zero has no"):
        run(ConvNet().double(), sampler, start(), [Zero(BaseOptions())])


# --- the scalar in IEC ------------------------------------------------------------------------


def measured_by_hand(network: nn.Module, sampler: Any, weight: float) -> list[float]:
    """Projections of IEC's prediction on the plain one, on a trajectory that takes the former."""
    denoiser = Denoiser(network, TinyModel().calibration_condition(range(4)), Clock(5))
    x, scales = calibration_noise(), list[float]()
    for index, timestep in enumerate(sampler.timesteps):
        a, b = ddim_coefficients(*sampler._abar[index : index + 2])
        with torch.no_grad():
            eps = denoiser(x, timestep)
            second = denoiser(a * x + b * eps, timestep)
            refined = (1 - weight) * eps + weight * second
        rows = zip(refined.flatten(1), eps.flatten(1), strict=True)
        ratios = [float(r @ e) / float(e @ e) for r, e in rows]
        scales.append(sum(ratios) / len(ratios))
        x = a * x + b * refined
    return scales


def test_the_scalar_is_the_projection_on_iecs_own_trajectory() -> None:
    network, sampler, clock = ConvNet(strength=2.0), ddim(steps=5), Clock(5)
    callback = build(ScaleMatched, {"of": {"weights": [0.7], "tolerance": None}})
    artifact = callback.calibrate(bench_on(network, sampler, clock))
    wanted = measured_by_hand(network, sampler, 0.7)
    assert artifact["scales"].tolist() == pytest.approx(wanted, rel=1e-4)
    assert max(abs(scale - 1) for scale in wanted) > 0.01
    callback.use(artifact)
    clock.reset()
    noise = start()
    states = trajectory(network.double(), sampler, noise, [callback], clock=clock)
    assert clock.evaluations.full == 15, "scaling is free"
    a, b = ddim_coefficients(*sampler._abar[:2])
    with torch.no_grad():
        eps = network(noise.initial(), torch.full((3,), sampler.timesteps[0]))
    torch.testing.assert_close(states[1], a * states[0] + wanted[0] * b * eps, rtol=1e-4, atol=1e-4)


def test_steps_that_iec_leaves_have_the_scale_one() -> None:
    network, sampler, clock = ConvNet(strength=2.0), ddim(steps=4), Clock(4, [0, 2])
    scales = build(ScaleMatched).calibrate(bench_on(network, sampler, clock))["scales"]
    assert scales[[1, 3]].tolist() == [1, 1]
    assert (scales[[0, 2]] != 1).all()


def test_the_scalars_of_several_iecs_are_those_of_each_where_it_corrects() -> None:
    network, sampler = ConvNet(strength=2.0), ddim(steps=4)
    parts = [
        {"name": "iec", "weights": [0.3], "where": [0, 2]},
        {"name": "iec", "weights": [0.9], "where": [1]},
    ]
    callback = build(ScaleMatched, {"of": parts})
    scales = callback.calibrate(bench_on(network, sampler, Clock(4)))["scales"]
    first = build(ScaleMatched, {"of": parts[0]})
    alone = first.calibrate(bench_on(network, sampler, Clock(4)))["scales"]
    assert scales[0] == alone[0]
    assert scales[1] != 1 == alone[1]
    assert scales[2] != alone[2]  # on a trajectory that the second has corrected
    assert scales[3] == 1
    clipping = {"of": [{**parts[0], "allow_clipping": True}, parts[1]]}
    with pytest.raises(Incompatible, match="clips"):
        build(ScaleMatched, clipping).check(ddim(steps=4, clip_sample=True), Clock(4))


def test_a_whole_part_names_its_iec() -> None:
    part = {"name": "iec", "preset": "official_ldm", "where": "all"}
    options = build(ScaleMatched, {"of": part}).options.of
    assert options == build(IEC, {"preset": "official_ldm", "where": "all"}).options
    with pytest.raises(ConfigError, match=r"of.name"):
        build(ScaleMatched, {"of": {"name": "deepcache"}})
    clipping = ddim(steps=4, clip_sample=True)
    with pytest.raises(Incompatible, match="clips"):
        build(ScaleMatched).check(clipping, Clock(4))


def test_a_denoiser_takes_a_timestep_for_each_row() -> None:
    network, x = ConvNet().double(), start().initial()
    denoiser = Denoiser(network, Condition(), Clock(4))
    when = torch.tensor([10, 500, 990])
    with torch.no_grad():
        together = denoiser(x, when)
        alone = torch.cat([denoiser(x[[i]], int(t)) for i, t in enumerate(when)])
    torch.testing.assert_close(together, alone)
