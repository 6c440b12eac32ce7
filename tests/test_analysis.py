"""The measurements behind ``iec-eval analyze``, against dense matrices and known answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    SCHEDULE,
    ConstantNet,
    ConvNet,
    FixedNoise,
    Recorder,
    build,
    ddim,
    oracle,
    original_ddpm,
    plan_with,
    run,
    unet,
)
from scipy.optimize import curve_fit
from torch import Tensor, nn
from torch.func import jacrev, jvp

from iec_eval.analysis import plots
from iec_eval.analysis.affine import AffineStep, affine_steps
from iec_eval.analysis.bench import Subject, _Recorder
from iec_eval.analysis.growth import fit_growth, fitted
from iec_eval.analysis.jacobian import Jacobian
from iec_eval.analysis.lanczos import largest_singular_values
from iec_eval.analysis.pieces import Pieces, step_name
from iec_eval.analysis.question import LAMBDAS, lambdas_listed, parts_named, spaced
from iec_eval.analysis.recommendation import callbacks_for
from iec_eval.analysis.residuals import (
    BeforeCorrection,
    Corrections,
    ResidualProbe,
    best_lambda,
    residuals_at,
    share_below,
)
from iec_eval.analysis.spectral import Operator, measurable, norms_at, operators
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.iec import IEC
from iec_eval.clock import Clock
from iec_eval.denoising import Condition, Denoiser, Step, denoise
from iec_eval.efficiency.deepcache import CachedUNet
from iec_eval.efficiency.quantizer import fake_quantize
from iec_eval.errors import ConfigError, Incompatible, UnknownName
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions
from iec_eval.progress import Progress
from iec_eval.samplers.base import Sampler, State
from iec_eval.samplers.ddim import ddim_coefficients
from iec_eval.samplers.diffusers import DiffusersSampler
from iec_eval.samplers.plms import PLMS

SHAPE = (3, 4, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_at(network: nn.Module, sampler: Sampler, index: int, sample: Tensor) -> Step:
    """A step whose own prediction has been taken, as a callback finds it."""
    clock = Clock(len(sampler.timesteps))
    denoiser = Denoiser(network, Condition(), clock)
    step = Step(index, State(sample), sampler, denoiser, FixedNoise(sample))
    with torch.no_grad():
        step.begin()
    return step


# --- singular values --------------------------------------------------------------------------


def searched(matrices: Tensor, **options: Any) -> Any:
    def forward(v: Tensor) -> Tensor:
        return torch.einsum("rij,rj->ri", matrices, v)

    def transpose(u: Tensor) -> Tensor:
        return torch.einsum("rij,ri->rj", matrices, u)

    return largest_singular_values(
        forward, transpose, random(*matrices.shape[:2], seed=1), **options
    )


def test_largest_singular_values_are_those_of_svd() -> None:
    eye = torch.eye(60, dtype=torch.float64)
    matrices = torch.stack(
        [random(60, 60), eye + 0.001 * random(60, 60, seed=2), 3 * eye, 0 * eye,
         torch.diag(torch.linspace(1, 2, 60, dtype=torch.float64))]
    )  # fmt: skip
    found, wanted = searched(matrices), torch.linalg.matrix_norm(matrices, 2)
    assert found.converged.all()
    torch.testing.assert_close(found.value, wanted, rtol=1e-5, atol=1e-12)
    assert (found.value <= wanted + 1e-12).all()  # from below
    assert found.iterations[2] < found.iterations[0]
    # of the nearly constant one the part that matters, what it has beyond 1
    assert float(found.value[1] - 1) == pytest.approx(float(wanted[1] - 1), rel=1e-3)


def test_a_search_that_ends_early_says_so() -> None:
    matrix = torch.diag(torch.cat([torch.linspace(0, 1, 199), torch.tensor([1.001])]))[None]
    found = searched(matrix.double(), max_iterations=9)
    assert not found.converged.any()
    assert found.iterations.tolist() == [9]
    assert float(found.residual) > 1e-3
    values = torch.linalg.svdvals(matrix.double())
    assert (values - found.value).abs().min() <= found.residual  # what the residual promises


def test_all_directions_exhausted_is_exact() -> None:
    matrices = random(3, 6, 6)
    found = searched(matrices, tolerance=0.0)
    torch.testing.assert_close(
        found.value, torch.linalg.matrix_norm(matrices, 2), rtol=1e-12, atol=0
    )


# --- products with Jacobians ------------------------------------------------------------------


@pytest.mark.parametrize("network", [ConvNet(strength=2.0).double(), unet(sample_size=4).double()])
def test_products_are_those_of_forward_and_reverse_mode(network: nn.Module) -> None:
    """The U-Net has attention, whose fused kernels have no second derivative."""

    def function(x: Tensor) -> Tensor:
        output = network(x, torch.full((len(x),), 300.0))
        return output if isinstance(output, Tensor) else output.sample

    point, v, u = random(2, *SHAPE), random(2, 48, seed=1), random(2, 48, seed=2)
    with Jacobian(function, point) as at:
        forward, back = at.forward(v), at.transpose(u)
    torch.testing.assert_close((forward * u).sum(1), (v * back).sum(1), rtol=1e-10, atol=1e-10)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, wanted = jvp(function, (point,), (v.view_as(point),))
    torch.testing.assert_close(forward, wanted.flatten(1), rtol=1e-8, atol=1e-8)


def test_rounding_passes_derivatives_straight_through() -> None:
    """1 inside the grid, 0 where values are clipped, though the function is flat everywhere."""
    x = torch.tensor([-0.1, 0.0, 0.26, 0.9, 1.49, 1.6, 9.0]).double().view(1, 1, 1, 7)
    scale, zero = torch.tensor(0.1).double(), torch.tensor(0.0).double()
    with torch.no_grad(), Jacobian(lambda x: fake_quantize(x, scale, zero, 4), x) as at:
        ones = at.forward(torch.ones(1, 7).double())
        back = at.transpose(torch.ones(1, 7).double())
    assert ones.tolist() == back.tolist() == [[0, 1, 1, 1, 1, 0, 0]]


def test_norms_are_those_of_the_dense_jacobian() -> None:
    network, sampler = ConvNet(strength=6.0).double(), ddim(steps=6)
    sample = random(2, *SHAPE)
    step = step_at(network, sampler, 2, sample)
    now, then = sampler._abar[2:4]
    a, b = ddim_coefficients(now, then)
    affine = affine_steps(plan_with(sampler))[2]
    assert (affine.a, affine.b) == (pytest.approx(a, rel=1e-6), pytest.approx(b, rel=1e-6))
    for at_once in (1, 5, 100):  # groups of operators, whatever fits
        found = norms_at(step, operators(affine, LAMBDAS), iterations=48, at_once=at_once)
        assert found["adjoint_error"] < 1e-12
        for image in range(2):
            dense = jacrev(lambda x: network(x[None], torch.full((1,), sampler.timesteps[2]))[0])
            jacobian = dense(sample[image]).reshape(48, 48).detach()
            eye = torch.eye(48, dtype=torch.float64)
            wanted = {"step": a * eye + b * jacobian, "jacobian": jacobian}
            wanted |= {f"{x:g}": (1 - x) * eye + x * b * jacobian for x in LAMBDAS}
            for name, matrix in wanted.items():
                norm = float(torch.linalg.matrix_norm(matrix, 2))
                assert found["norms"][name][image]["value"] == pytest.approx(norm, rel=1e-5), name
                assert found["norms"][name][image]["converged"]


def test_measuring_leaves_the_cache_alone() -> None:
    """A row's next cached steps recall what they would have recalled, in plain tensors."""
    clock = Clock(4, [0, 2])
    cached = CachedUNet(unet(), 2, clock)

    class Probe(Recorder):
        def refine(self, step: Step, prediction: Tensor) -> Tensor:
            found = norms_at(step, [Operator("j", 0, 1)], iterations=8, at_once=2)
            self.found.append(found["norms"]["j"][0]["value"])
            return super().refine(step, prediction)

    probe, plain = Probe(), Recorder()
    probe.found = []  # type: ignore[attr-defined]
    noise = Noise(5, [0, 1], (3, 8, 8))
    denoiser = Denoiser(cached, Condition(), clock)
    with torch.no_grad():
        probed = denoise(ddim(steps=4), denoiser, noise, [IEC(build(IEC).options), probe])
        bare = denoise(ddim(steps=4), denoiser, noise, [IEC(build(IEC).options), plain])
    assert torch.equal(probed, bare)
    values = probe.found  # type: ignore[attr-defined]
    assert len(values) == 4
    assert min(values) > 0


# --- the recorded truth -----------------------------------------------------------------------


@cache
def recorded() -> tuple[Any, dict[str, Tensor], list[dict[str, Any]]]:
    tensors, about = oracle("ddpm_unet")
    spectral, truth = oracle("spectral")
    state = {key[5:]: value for key, value in tensors.items() if key.startswith("ckpt/")}
    network = original_ddpm(state, {**about["config"], "resolution": 8, "attn_resolutions": [4]})
    network = network.double()
    network.time_proj = OriginalEmbedding()
    return network, spectral, truth["values"]


class OriginalEmbedding(nn.Module):
    """The sinusoidal embedding rounded as in the original code.

    At 8x8 the deepest feature is one pixel, and normalising two channels of it magnifies the last
    bit: diffusers' order of operations moves some norms by 4e-4.
    """

    def forward(self, timesteps: Tensor) -> Tensor:
        rate = math.log(10000) / 15
        angles = timesteps.float()[:, None] * torch.exp(torch.arange(16).float() * -rate)[None]
        return torch.cat([angles.sin(), angles.cos()], dim=1)


@pytest.mark.parametrize("index", [3, 16])
def test_recorded_norms(index: int) -> None:
    """In double precision; those that the paper's setting is about."""
    assert_recorded_norms(index, [0.5])


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 3, 7, 12, 16, 19])
def test_all_recorded_norms(index: int) -> None:
    """||A I + B J||, ||J|| and ||grad G|| for each lambda, each sample."""
    assert_recorded_norms(index, LAMBDAS)


def assert_recorded_norms(index: int, lambdas: Sequence[float]) -> None:
    network, tensors, values = recorded()
    rows = [value for value in values if value["step"] == index]
    sampler = ddim(steps=20, spacing="quad")
    affine = affine_steps(plan_with(sampler))[index]
    assert affine.a == pytest.approx(rows[0]["A"], rel=1e-6)
    assert affine.b == pytest.approx(rows[0]["B"], rel=1e-4)  # of single-precision products
    assert sampler.timesteps[index] == rows[0]["t"]
    step = step_at(network, sampler, index, tensors["in/x_states"][index].double())
    found = norms_at(step, operators(affine, lambdas), iterations=200, at_once=64)["norms"]
    for image, row in enumerate(rows):
        wanted = {"step": row["norm_A_I_plus_B_J"], "jacobian": row["norm_J"]}
        wanted |= {f"{value:g}": row["norm_G"][f"{value:.1f}"] for value in lambdas}
        assert wanted.keys() == found.keys()
        for name, norm in wanted.items():
            assert found[name][image]["converged"]
            assert found[name][image]["value"] == pytest.approx(norm, rel=1e-4), name


def test_ten_power_iterations_flip_the_claim() -> None:
    """At step 16 the norm is 1.0024. Power iteration says below 1, from twenty products."""
    network, tensors, values = recorded()
    index, sampler = 16, ddim(steps=20, spacing="quad")
    affine = affine_steps(plan_with(sampler))[index]
    sample = tensors["in/x_states"][index].double()
    step = step_at(network, sampler, index, sample)
    with Jacobian(lambda x: step.predict(x, store=False), sample) as at:
        v = random(2, 192)
        for _ in range(10):
            w = affine.a * v + affine.b * at.forward(v)
            v = affine.a * w + affine.b * at.transpose(w)
            v = v / v.norm(dim=1, keepdim=True)
        power = (affine.a * v + affine.b * at.forward(v)).norm(dim=1)
    assert power.max() < 1
    found = norms_at(step, operators(affine, [])[:1], iterations=200, at_once=2)["norms"]["step"]
    truth = [value["norm_A_I_plus_B_J"] for value in values if value["step"] == index]
    for one, wanted in zip(found, truth, strict=True):
        assert one["value"] > 1
        assert one["value"] - 1 == pytest.approx(wanted - 1, rel=1e-3)
        assert one["iterations"] < 40


# --- A and B ----------------------------------------------------------------------------------


def diffusers(scheduler: str, **more: Any) -> DiffusersSampler:
    options = {"scheduler": scheduler, "steps": 6, **more}
    sampler: DiffusersSampler = build(DiffusersSampler, options, SCHEDULE)
    return sampler


class _NormsEverywhere(DenoisingCallback):
    """Spectral norms at every step, one operator after the other."""

    name = "norms-everywhere"

    def __init__(self, affine: Sequence[AffineStep]) -> None:
        super().__init__(BaseOptions())
        self._affine = affine
        self.found: list[float] = []

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        chosen = operators(self._affine[step.index], LAMBDAS)
        norms = norms_at(step, chosen, iterations=100, at_once=64)["norms"]
        self.found += [one["value"] for operator in chosen for one in norms[operator.name]]
        return prediction


def test_what_is_measured_does_not_depend_on_the_units_of_the_sample() -> None:
    """Euler keeps x / sqrt(abar): its steps are DDIM's, and so are A, B, norms and distances."""
    same, noise = {"config": {"timestep_spacing": "leading"}}, Noise(3, range(2), SHAPE)
    network = ConvNet(strength=2.0)
    found = {}
    for name in ("EulerDiscreteScheduler", "DDIMScheduler"):
        affine = affine_steps(plan_with(diffusers(name, **same)))
        norms, states = _NormsEverywhere(affine), _Recorder(Progress("steps", visible=False))
        sampler = diffusers(name, **same)
        denoiser = Denoiser(network, Condition(), Clock(len(sampler.timesteps)))
        with torch.no_grad():
            denoise(sampler, denoiser, noise, [norms, states])
        coefficients = torch.tensor([(step.a, step.b) for step in affine])
        found[name] = (coefficients, torch.tensor(norms.found), torch.stack(states.states))
        assert len(states.states) == len(affine) + 1
    euler, ddim = found.values()
    for one, other in zip(euler, ddim, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_pairs_of_steps_have_no_norms_of_their_own() -> None:
    """Their sample is in the solver's memory: A would be 0 at every second one."""
    for name, count in (("HeunDiscreteScheduler", 0), ("EulerDiscreteScheduler", 6)):
        plan = plan_with(diffusers(name))
        subject, affine = Subject("a row", Path(), plan, frozenset()), affine_steps(plan)
        assert len(measurable(subject, affine, range(len(affine)))) == count


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_coefficients_of_ddim(eta: float) -> None:
    sampler = ddim(steps=7, eta=eta)
    for index, found in enumerate(affine_steps(plan_with(sampler))):
        now, then = sampler._abar[index : index + 2]
        sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        a, b = ddim_coefficients(now, then, sigma)
        assert (found.a, found.b) == (pytest.approx(a, rel=1e-6), pytest.approx(b, abs=1e-7))
        assert found.evaluations == 1


def test_coefficients_of_multistep_samplers() -> None:
    """The newest prediction's weight: of Adams-Bashforth in PLMS, 1, 3/2, 23/12, 55/24."""
    sampler = build(PLMS, {"steps": 10}, SCHEDULE)
    found = affine_steps(plan_with(sampler))
    assert [step.evaluations for step in found] == [2] + [1] * 9
    for index, weight in enumerate((1, 3 / 2, 23 / 12, 55 / 24, 55 / 24)):
        _, b = ddim_coefficients(*sampler._abar[index : index + 2])
        assert found[index].b == pytest.approx(weight * b, rel=1e-5)
    for name in (
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ):
        steps = affine_steps(plan_with(diffusers(name)))
        assert len(steps) == 6
        assert all(math.isfinite(step.a) and step.b != 0 for step in steps)


class Squashing(Sampler):
    """Says nothing of it, but bends large predictions."""

    name = "squashing"
    timesteps = (2.0, 1.0)

    def step(self, state: State, index: int, prediction: Tensor, draw: Any) -> State:
        return State(0.9 * state.sample - torch.tanh(prediction))


class Limiting(Squashing):
    """Cuts off what a small displacement does not reach."""

    name = "limiting"

    def step(self, state: State, index: int, prediction: Tensor, draw: Any) -> State:
        return State(0.9 * state.sample - prediction.clamp(-7, 7))


def test_samplers_without_coefficients_are_refused() -> None:
    with pytest.raises(Incompatible, match=r"a row: sampler 'ddim' clips.*switch clipping off"):
        affine_steps(plan_with(ddim(steps=4, clip_sample=True)))
    with pytest.raises(Incompatible, match="step 0 of the sampler is not affine"):
        affine_steps(plan_with(build(Squashing, {}, SCHEDULE)))
    with pytest.raises(Incompatible, match="step 0 of the sampler is not affine"):
        affine_steps(plan_with(build(Limiting, {}, SCHEDULE)))


# --- growth -----------------------------------------------------------------------------------


def recursion(growth: float, steps: int = 100) -> list[float]:
    """Errors that every step multiplies, and adds as much to: the paper's equation 8, a number."""
    return list(itertools.accumulate(range(steps), lambda d, _: growth * d + 0.01, initial=0.0))


@pytest.mark.parametrize("growth", [1.1, 1.01, 1.002])
def test_errors_that_every_step_stretches_grow_exponentially(growth: float) -> None:
    found = fit_growth(recursion(growth))
    assert found["better"] == "exponential"
    assert found["exponential"]["rate"] == pytest.approx(math.log(growth), rel=1e-6)
    assert found["exponential"]["scale"] == pytest.approx(0.01 / (growth - 1), rel=1e-6)
    assert found["exponential"]["r2"] == pytest.approx(1)


@pytest.mark.parametrize("growth", [0.9, 0.99, 0.998])
def test_errors_that_every_step_shrinks_flatten_out(growth: float) -> None:
    found = fit_growth(recursion(growth))
    assert found["better"] == "flattening"
    assert found["flattening"]["rate"] == pytest.approx(-math.log(growth), rel=1e-6)
    assert found["flattening"]["scale"] == pytest.approx(0.01 / (1 - growth), rel=1e-6)


def test_growth_of_other_shapes() -> None:
    steps = np.arange(41)
    found = fit_growth(recursion(1.0))
    assert (found["better"], found["linear"]["slope"]) == ("linear", pytest.approx(0.01))
    nearly = 0.01 * steps * (1 + 1e-4 * steps) + 1e-2 * np.sin(7 * steps)  # hardly bent, and noisy
    assert fit_growth(nearly.tolist())["better"] == "linear"
    assert fit_growth((np.sin(steps) ** 2).tolist())["better"] == "none"
    assert fit_growth([0.0] * 9)["better"] == "no error"
    assert fit_growth([0.0, 1.0, 2.0])["better"] == "too few steps"


@pytest.mark.parametrize(("curve", "sign"), [("exponential", 1), ("flattening", -1)])
def test_fits_are_least_squares(curve: str, sign: int) -> None:
    steps = np.arange(1, 31)
    y = sign * 2 * np.expm1(sign * 0.05 * steps) + 0.2 * np.cos(steps)
    found = fit_growth([0, *y])[curve]
    (scale, rate), _ = curve_fit(
        lambda x, a, b: sign * a * np.expm1(sign * b * x), steps, y, p0=(1, 0.1)
    )
    assert (found["scale"], found["rate"]) == (pytest.approx(scale, rel=1e-4),
                                               pytest.approx(rate, rel=1e-4))  # fmt: skip
    ours = fitted(curve, found, steps)
    assert ours == pytest.approx(sign * scale * np.expm1(sign * rate * steps), rel=1e-3)
    left = ((y - ours) ** 2).sum()
    assert found["r2"] == pytest.approx(1 - left / ((y - y.mean()) ** 2).sum(), rel=1e-6)
    assert found["aic"] == pytest.approx(30 * math.log(left / 30) + 6, rel=1e-6)


# --- residuals --------------------------------------------------------------------------------


class LinearNet(nn.Module):
    """Predicts M x."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return (sample.flatten(1) @ self.matrix.T).view_as(sample)


def test_residuals_of_a_linear_network() -> None:
    """x' = A x + B M x is known in closed form; so is the lambda of least residual."""
    matrix, sampler, sample = random(48, 48) / 4, ddim(steps=3), random(2, *SHAPE)
    step = step_at(LinearNet(matrix), sampler, 0, sample)
    plain = step.predict(sample)
    found = residuals_at(step, plain, plain)
    a, b = ddim_coefficients(*sampler._abar[:2])

    def residual(x: Tensor) -> Tensor:
        return a * sample.flatten(1) + b * x @ matrix.T - x

    start = a * sample.flatten(1) + b * sample.flatten(1) @ matrix.T
    tried = torch.linspace(0, 1.5, 3001).double()
    sums = [float(residual(start + x * residual(start)).square().sum()) for x in tried]
    assert found["lambda"] == pytest.approx(float(tried[int(np.argmin(sums))]), abs=1e-3)
    for key, x in (("before", 0.0), ("after_half", 0.5), ("after_one", 1.0),
                   ("after_lambda", found["lambda"])):  # fmt: skip
        wanted = residual(start + x * residual(start)).norm(dim=1)
        assert found[key] == pytest.approx(wanted.tolist(), rel=1e-6), key
    assert found["after_own"] is None
    refined = step.predict(start.view_as(sample))
    own = residuals_at(step, plain, (plain + refined) / 2)
    assert own["after_own"] == pytest.approx(found["after_half"], rel=1e-6)


def test_nothing_to_correct() -> None:
    sample = random(2, *SHAPE)
    step = step_at(ConstantNet(), ddim(steps=3), 0, sample)
    plain = step.predict(sample)
    found = residuals_at(step, plain, plain)
    assert (found["lambda"], found["before"]) == (0.0, [0.0, 0.0])
    assert share_below([found], "after_half") is None
    assert best_lambda(torch.ones(3), 3 * torch.ones(3)) == 0.0  # it diverges: do nothing
    assert best_lambda(torch.ones(3), 0.9 * torch.ones(3)) == 1.5


def test_the_share_counts_pairs() -> None:
    pieces = [{"before": [1.0, 2.0], "after": [0.5, 3.0]}, {"before": [1.0, 0.0], "after": [0, 0]}]
    assert share_below(pieces, "after") == {"share": 2 / 3, "pairs": 3}


def test_measuring_residuals_changes_no_image(tmp_path: Any) -> None:
    """Not even of a cached row whose corrector draws fresh noise for every evaluation."""
    clock, sampler = Clock(6, [0, 3]), ddim(steps=6, eta=0.8)
    cached, noise = CachedUNet(unet(), 2, clock), Noise(5, [0, 1], (3, 8, 8))
    corrector = build(IEC, {"preset": "official_ddim", "tolerance": None})
    notes, pieces = Corrections(), Pieces(tmp_path, "residuals", {})

    class NoBench:
        class progress:  # noqa: N801
            @staticmethod
            def advance(amount: float) -> None: ...

    probe = ResidualProbe(range(6), notes, pieces, NoBench)  # type: ignore[arg-type]
    plain = run(cached, sampler, noise, [corrector], clock=clock)
    corrector.on_correction = notes.take
    seen = run(cached, sampler, noise, [BeforeCorrection(notes), corrector, probe], clock=clock)
    assert torch.equal(plain, seen)
    found = [pieces.read(step_name(index)) for index in range(6)]
    assert [piece["after_own"] is not None for piece in found if piece] == [
        True, False, False, True, False, False
    ]  # fmt: skip


# --- recommendation and questions -------------------------------------------------------------


def test_steps_of_one_lambda_share_a_callback() -> None:
    chosen = [{"step": 4, "lambda": 0.5}, {"step": 1, "lambda": 0.9}, {"step": 0, "lambda": 0.5}]
    assert callbacks_for(chosen) == [
        {"name": "iec", "weights": [0.5], "where": [0, 4]},
        {"name": "iec", "weights": [0.9], "where": [1]},
    ]
    assert callbacks_for([]) == []


def test_questions() -> None:
    assert spaced(100, 5) == [0, 25, 50, 74, 99]
    assert (spaced(3, 7), spaced(5, 1)) == ([0, 1, 2], [0])
    assert all(len(set(spaced(97, n))) == n for n in range(1, 98))
    assert parts_named("growth, spectral") == ["spectral", "growth"]
    assert lambdas_listed("1,0.5,1") == [0.5, 1.0]
    with pytest.raises(UnknownName, match="did you mean 'spectral'"):
        parts_named("spektral")
    for wrong in ("half", "0.5,,1", "0", "-1", "2.5", "nan"):
        with pytest.raises(ConfigError, match="--lambdas"):
            lambdas_listed(wrong)


def test_pieces_are_kept_apart_and_damage_is_noticed(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, other = Pieces(tmp_path, "a", {"images": 1}), Pieces(tmp_path, "a", {"images": 2})
    ours.write("step", {"x": 0.1})
    ours.write_tensor("states", torch.arange(3))
    assert ours.read("step") == {"x": 0.1}
    assert other.read("step") is None
    assert ours.read_tensor("states") is not None
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-9])
    assert ours.read("step") is None
    assert ours.read_tensor("states") is None
    assert capsys.readouterr().err.count("made again") == 2


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures of the plots that a test draws, each of which comes out as ``<svg>``."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "figure_as_svg", lambda figure: drawn.append(figure) or "<svg>")
    return drawn


def test_long_names_stay_inside_the_plot_and_the_band_is_the_middle_half(
    figures: list[Any],
) -> None:
    distance = np.outer(np.arange(4), [1.0, 2.0, 3.0, 4.0, 100.0])  # of steps and images
    names = ["row", "row + correction"], ["full precision", "full precision + correction"]
    series = [
        {
            "run": run,
            "versus": versus,
            "mean": distance.mean(1).tolist(),
            "fit": {"better": "none"},
        }
        | {"distance": distance.tolist()}
        for run in names[0]
        for versus in names[1]
    ]
    series[3]["fit"] = fit_growth(recursion(1.1, 3 + 1))
    assert plots.growth_plot({"series": series}) == "<svg>"
    axes = figures[0].axes[0]
    assert axes.lines[-1].get_ydata() == pytest.approx(recursion(1.1)[1:4])
    assert len(axes.get_legend().get_texts()) == 4
    figures[0].canvas.draw()
    assert axes.get_legend().get_window_extent().x1 <= figures[0].bbox.x1
    (band,) = axes.collections[0].get_paths()
    last = band.vertices[band.vertices[:, 0] == 3][:, 1]
    assert (last.min(), last.max()) == (6, 12)


def test_the_ablation_plot_shows_differences_with_their_intervals(
    figures: list[Any],
) -> None:
    gap = {"value": -0.5, "ci95": [-0.75, -0.125], "judgement": "better"}
    measured = [
        {"overhead": 0.0, "metrics": {"is": 1.0, "fid": 3.0}, "differences": {}},
        {"overhead": 0.5, "metrics": {"is": 1.5, "fid": 2.5}, "differences": {"fid": gap}},
    ]
    rows = [{"label": str(n), "measured": one} for n, one in enumerate(measured)]
    assert plots.ablation_plot({"choices": rows, "quality": "fid"}) == "<svg>"
    (drawn,) = figures[0].axes[0].containers
    point, _, (bar,) = drawn.lines
    assert (point.get_xdata(), point.get_ydata()) == ([50], [-0.5])
    assert bar.get_segments()[0][:, 1].tolist() == [-0.75, -0.125]
    assert plots.ablation_plot({"choices": rows[:1], "quality": "fid"}) == "<svg>"
    assert figures[1].axes[0].containers[0].lines[0].get_ydata() == [3.0]
    none = {"choices": [{"label": "0", "measured": None}], "quality": None}
    assert plots.ablation_plot(none) is None


def test_a_step_that_does_not_move_leaves_a_gap_in_the_residuals(
    figures: list[Any],
) -> None:
    none = {"after_half": None, "after_lambda": None, "after_own": None, "size": [2.0, 4.0]}
    steps = [{"step": n, "before": before, **none} for n, before in enumerate([[1.0, 1.0], [0, 0]])]
    assert plots.residual_plot({"steps": steps}) == "<svg>"
    (line,) = figures[0].axes[0].lines
    assert line.get_ydata()[0] == 0.375
    assert np.isnan(line.get_ydata()[1])
