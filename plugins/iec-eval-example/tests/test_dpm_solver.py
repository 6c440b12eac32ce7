import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from iec_eval_example import DPMSolver, DPMSolverOptions

from iec_eval.api import ConfigError, Noise, NoiseSchedule
from iec_eval.testing import check_sampler


def test_it_keeps_the_sampler_contract():
    check_sampler(DPMSolver, {"steps": 7})


def test_it_equals_diffusers():
    ours = DPMSolver(DPMSolverOptions(steps=12), NoiseSchedule.from_betas())
    theirs = DPMSolverMultistepScheduler(
        timestep_spacing="linspace", final_sigmas_type="zero", lower_order_final=True
    )
    theirs.set_timesteps(12)
    assert theirs.timesteps.tolist() == list(ours.timesteps)
    noise = Noise(0, range(3), (1, 4, 4))
    state, sample = ours.start(noise.initial()), noise.initial()
    for index, timestep in enumerate(theirs.timesteps):
        prediction = torch.tanh(sample + 0.01 * index)
        sample = theirs.step(prediction, timestep, sample).prev_sample
        state = ours.step(state, index, torch.tanh(state.sample + 0.01 * index), noise.draw(index))
        torch.testing.assert_close(state.sample, sample, rtol=2e-4, atol=2e-4)


def test_more_steps_than_timesteps_are_refused():
    schedule = NoiseSchedule.from_betas()
    assert len(set(DPMSolver(DPMSolverOptions(steps=999), schedule).timesteps)) == 999
    with pytest.raises(ConfigError, match="1000 steps wanted, this model allows 999"):
        DPMSolver(DPMSolverOptions(steps=1000), schedule)
