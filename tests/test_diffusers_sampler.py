"""diffusers' schedulers as samplers: its own loop to the bit, pure, and what IEC may correct."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import diffusers
import pytest
import torch
from helpers import SCHEDULE, ConvNet, FixedNoise, build, ddim, run
from torch import Tensor

from iec_eval.callbacks.iec import IEC
from iec_eval.clock import Clock
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Noise
from iec_eval.samplers.diffusers import SCHEDULERS, DiffusersSampler, _betas
from iec_eval.testing import TinyModel, check_sampler

STEPS = 7
CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": True}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
]
FLOWS: list[tuple[str, dict[str, Any]]] = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"flow_shift": 2.0}),
    ("UniPCMultistepScheduler", {}),
]
ALL = [(name, config, "epsilon") for name, config in CONFIGURATIONS]
ALL += [(name, config, "flow") for name, config in FLOWS]
ALL += [("DDIMScheduler", {"rescale_betas_zero_snr": True}, "v")]
ALL += [("DPMSolverMultistepScheduler", {}, "v"), ("EulerDiscreteScheduler", {}, "sample")]
IDS = [f"{name}-{'-'.join(map(str, config.values()))}-{kind}" for name, config, kind in ALL]
every = pytest.mark.parametrize(("name", "config", "kind"), ALL, ids=IDS)


def sampler(name: str, config: Any, kind: str = "epsilon", steps: int = STEPS) -> DiffusersSampler:
    options = {"scheduler": name, "steps": steps, "prediction": kind, "config": config}
    found: DiffusersSampler = build(DiffusersSampler, options, SCHEDULE)
    return found


def theirs(name: str, config: dict[str, Any], kind: str) -> Any:
    """The scheduler as a user of diffusers makes it."""
    cls = getattr(diffusers, name)
    about: dict[str, Any] = {"num_train_timesteps": 1000}
    if not name.startswith("FlowMatch"):
        names = {"v": "v_prediction", "flow": "flow_prediction"}
        about |= {"trained_betas": _betas(SCHEDULE), "prediction_type": names.get(kind, kind)}
        if kind == "flow":
            about["use_flow_sigmas"] = True
    if name in ("DDIMScheduler", "DDPMScheduler"):
        about["clip_sample"] = False
    made = cls(**about | config)
    made.set_timesteps(STEPS)
    return made


def their_loop(scheduler: Any, net: Any, noise: Noise) -> Tensor:
    """The loop of diffusers' pipelines, with our noise where it draws."""
    module = sys.modules[type(scheduler).__module__]
    sample = noise.initial() * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, timestep)
        prediction = net(scaled, timestep.expand(len(sample)))

        def drawn(*_: Any, at: int = index, **__: Any) -> Tensor:
            return noise.draw(at).value

        if not hasattr(module, "randn_tensor"):
            sample = scheduler.step(prediction, timestep, sample).prev_sample
            continue
        with patch.object(module, "randn_tensor", drawn):
            sample = scheduler.step(prediction, timestep, sample).prev_sample
    return sample


# --- the same numbers -------------------------------------------------------------------------


@every
def test_diffusers_own_loop_to_the_bit(name: str, config: Any, kind: str) -> None:
    net, noise = ConvNet(), Noise(3, range(2), (3, 8, 8))
    ours = sampler(name, config, kind)
    with torch.inference_mode():
        wanted = their_loop(theirs(name, config, kind), net, noise)
    found = run(net, ours, noise)
    assert found.isfinite().all()
    assert torch.equal(found, wanted)


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 15
    assert {name for name, _, _ in ALL} == set(SCHEDULERS)


def test_our_ddim_is_theirs() -> None:
    noise = Noise(3, range(2), (3, 8, 8))
    found = run(ConvNet(), ddim(steps=10), noise)
    wanted = run(ConvNet(), sampler("DDIMScheduler", {}, steps=10), noise)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# --- the contract -----------------------------------------------------------------------------


@every
def test_it_keeps_the_contract(name: str, config: Any, kind: str) -> None:
    """Needless previews leave no trace, a step called again is the same, images are alone."""
    options = {"scheduler": name, "steps": 4, "prediction": kind, "config": config}
    check_sampler(DiffusersSampler, options, tolerance=2e-4)


def test_what_is_as_noisy_as_another_step_is_scaled_for_it() -> None:
    """As an estimate is that IEC looks at; after the last step there is no noise."""
    ours, scheduler = (
        sampler("EulerDiscreteScheduler", {}),
        theirs("EulerDiscreteScheduler", {}, "epsilon"),
    )
    sample = torch.randn(1, 3, 8, 8)
    state = ours.start(sample)
    for index, sigma in enumerate(scheduler.sigmas[:-1]):
        shown = ours.network_input(state, index, sample)
        torch.testing.assert_close(shown, sample / (sigma**2 + 1) ** 0.5)
    state = ours.step(state, 0, sample, Noise(0, [0], (3, 8, 8)).draw(0))
    shown = ours.network_input(state, 2, sample)
    torch.testing.assert_close(shown, sample / (scheduler.sigmas[2] ** 2 + 1) ** 0.5)
    assert torch.equal(ours.network_input(state, len(ours.timesteps), sample), sample)


@pytest.mark.parametrize("preset", ["paper", "official_ldm", "heun"])
def test_correction_on_euler_is_that_on_ddim(preset: str) -> None:
    """Euler's method is DDIM on samples divided by sqrt(abar), and the network sees DDIM's."""
    config = {"timestep_spacing": "leading"}
    noise, callbacks = Noise(3, range(2), (3, 8, 8)), [build(IEC, {"preset": preset})]
    euler, ddim, plain = (
        run(ConvNet(), sampler(name, config, steps=6), noise, used)
        for name, used in [
            ("EulerDiscreteScheduler", callbacks),
            ("DDIMScheduler", callbacks),
            ("DDIMScheduler", []),
        ]
    )
    torch.testing.assert_close(euler, ddim, atol=1e-4, rtol=1e-4)
    assert (ddim - plain).abs().max() > 0.05


@every
def test_every_step_is_shown_what_diffusers_shows(name: str, config: Any, kind: str) -> None:
    """From any step's state: a callback may look at the next step, or back."""
    ours, scheduler = sampler(name, config, kind), theirs(name, config, kind)
    sample, blank = torch.randn(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    state, states, wanted = ours.start(blank), [], []
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = sample
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(sample, timestep)
        wanted.append(scaled)
        states.append(state)
        scheduler.step(blank, timestep, blank)
        state = ours.step(state, index, blank, Noise(0, [0], (3, 8, 8)).draw(index))
    for state in states:
        for index, scaled in enumerate(wanted):
            assert torch.equal(ours.network_input(state, index, sample), scaled)


def test_betas_are_those_of_the_schedule() -> None:
    found = torch.tensor(_betas(SCHEDULE), dtype=torch.float32)
    assert torch.equal(found, torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).float())


def test_the_configuration_is_shared_and_nothing_else() -> None:
    """A copy for every step: most of a scheduler is its configuration, which is frozen."""
    ours = sampler("DPMSolverMultistepScheduler", {})
    state = ours.start(torch.randn(1, 3, 8, 8))
    after = ours.step(state, 0, state.sample, Noise(0, [0], (3, 8, 8)).draw(0))
    before, moved = vars(state.memory.scheduler), vars(after.memory.scheduler)
    shared = {name for name in before if moved[name] is before[name]}
    fixed = (bool, int, float, str, type(None))
    assert {name for name in shared if not isinstance(moved[name], fixed)} == {"_internal_dict"}


def test_random_steps_differ_by_image_and_not_by_batch() -> None:
    name = "EulerAncestralDiscreteScheduler"
    together = run(ConvNet(), sampler(name, {}), Noise(3, range(3), (3, 8, 8)))
    alone = run(ConvNet(), sampler(name, {}), Noise(3, [2], (3, 8, 8)))
    torch.testing.assert_close(together[2:], alone, atol=1e-4, rtol=1e-4)
    other = run(ConvNet(), sampler(name, {}), Noise(4, [2], (3, 8, 8)))
    assert not torch.allclose(alone, other, atol=1e-2)


# --- IEC --------------------------------------------------------------------------------------

CORRECTED = [
    case
    for case in ALL
    if (not SCHEDULERS[case[0]] or case[1].get("solver_order") == 1)
    and case[2] in ("epsilon", "flow")
]


@pytest.mark.parametrize(("name", "config", "kind"), CORRECTED)
def test_iec_runs_and_neutral_iec_is_none(name: str, config: Any, kind: str) -> None:
    noise, net = Noise(3, range(2), (3, 8, 8)), ConvNet()

    def images(**options: Any) -> Tensor:
        callback = build(IEC, {"allow_clipping": True, **options})
        callback.check(sampler(name, config, kind), Clock(STEPS))
        return run(net, sampler(name, config, kind), noise, [callback])

    plain = run(net, sampler(name, config, kind), noise)
    assert torch.equal(images(weights=[0.0], tolerance=None), plain)
    corrected = images(weights=[0.5], tolerance=None)
    assert corrected.isfinite().all()
    assert not torch.equal(corrected, plain)
    assert images(preset="heun").isfinite().all()


@pytest.mark.parametrize("name", [name for name, reason in SCHEDULERS.items() if reason])
def test_iec_is_refused_with_the_reason(name: str) -> None:
    kind = "flow" if name.startswith("Flow") else "epsilon"
    iec = build(IEC, {"weights": [0.5]})
    with pytest.raises(Incompatible, match=r"iec: sampler diffusers: .*two evaluations"):
        iec.check(sampler(name, {}, kind), Clock(STEPS))


def test_clipping_is_noticed() -> None:
    assert not sampler("DDIMScheduler", {}).clips
    assert sampler("DDIMScheduler", {"clip_sample": True}).clips
    assert sampler("UniPCMultistepScheduler", {"thresholding": True}).clips


# --- what can be wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "EulerScheduler"}, "wanted one of .*did you mean EulerDiscreteScheduler"),
        ({"scheduler": "DPMSolverSDEScheduler"}, "wanted one of DDIMScheduler"),
        (
            {"config": {"algoritm_type": "x"}},
            "unknown key 'algoritm_type'; did you mean 'algorithm",
        ),
        ({"config": {"trained_betas": [1.0]}}, "trained_betas comes from the model"),
        ({"config": {"beta_start": 0.1}}, "beta_start comes from the model"),
        ({"config": {"algorithm_type": "x"}}, "algorithm_type: Input should be .*, got 'x'"),
        ({"config": {"use_karras_sigmas": "no"}}, "use_karras_sigmas: .*boolean, got 'no'"),
        ({"config": {"solver_order": "2"}}, "solver_order: .*integer, got '2'"),
        ({"scheduler": "DDIM"}, "did you mean DDIMScheduler"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "wanted prediction: flow, got epsilon"),
        ({"scheduler": "DDIMScheduler", "prediction": "flow"}, "knows no flow matching"),
        ({"scheduler": "DDIMScheduler", "steps": 2000}, "refuses its options"),
        ({"steps": 0}, "greater than or equal to 1"),
        # what diffusers itself would only stumble over during sampling
        ({"scheduler": "EulerAncestralDiscreteScheduler", "prediction": "sample"}, "refuses its"),
        ({"scheduler": "PNDMScheduler", "prediction": "sample"}, "refuses its options: predict"),
        ({"scheduler": "DDPMScheduler", "config": {"variance_type": "learned"}}, "refuses its opt"),
        ({"steps": 1000}, "does not stay finite with 1000 steps"),
        ({"scheduler": "KDPM2AncestralDiscreteScheduler", "steps": 2}, "does not stay finite"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DiffusersSampler, {"scheduler": "DPMSolverMultistepScheduler", **options}, SCHEDULE)


def test_it_says_what_it_understands() -> None:
    assert sampler("DDIMScheduler", {}, "v").predictions == {"v"}
    assert TinyModel().prediction in sampler("DDIMScheduler", {}).predictions


def test_more_noise_than_one_step_has_is_refused() -> None:
    """Every draw is the step's own; two equal ones would be no noise."""
    ours = sampler("EulerAncestralDiscreteScheduler", {})
    state = ours.start(torch.randn(1, 3, 8, 8))
    step = type(state.memory.scheduler).step

    def twice(self: Any, *arguments: Any, **more: Any) -> Any:
        step(self, *arguments, **more)
        self._step_index -= 1
        return step(self, *arguments, **more)

    draw = Noise(0, [0], (3, 8, 8)).draw(0)
    with (
        patch.object(type(state.memory.scheduler), "step", twice),
        pytest.raises(RuntimeError, match="draws twice"),
    ):
        ours.step(state, 0, state.sample, draw)


def test_the_start_is_the_noise_scaled() -> None:
    start = torch.randn(1, 3, 8, 8)
    ours = sampler("EulerDiscreteScheduler", {})
    sigma = theirs("EulerDiscreteScheduler", {}, "epsilon").init_noise_sigma
    assert torch.equal(ours.start(FixedNoise(start).initial()).sample, start * sigma)
