"""What an evaluation of the network costs, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.assembly import Assembly, Plan, assemble_skeleton
from iec_eval.clock import Clock, Evaluations
from iec_eval.denoising import Condition, Denoiser, denoise
from iec_eval.noise import Noise


@dataclass(frozen=True)
class EvaluationCost:
    """Multiply-accumulates of one evaluation for one image, and the bytes of all weights.

    Convolutions, linear layers and attention products count, as torch's flop counter sees them;
    a guided evaluation is counted with both its halves.
    """

    macs_full: int
    macs_cached: int
    weight_bytes: int

    def macs(self, evaluations_full: float, evaluations_cached: float) -> float:
        """Multiply-accumulates of that many evaluations."""
        return self.macs_full * evaluations_full + self.macs_cached * evaluations_cached


def evaluation_cost(plan: Plan) -> EvaluationCost:
    """Count a full and, if the plan has any, a cached evaluation; no weights are read."""
    assembly = assemble_skeleton(plan)
    full = _count(assembly, full=True)
    some_cached = len(assembly.clock.full_steps) < assembly.clock.total
    cached = _count(assembly, full=False) if some_cached else 0
    tensors = [*assembly.network.parameters(), *assembly.network.buffers()]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return EvaluationCost(full, cached, weight_bytes)


def expected_evaluations(plan: Plan) -> Evaluations:
    """Evaluations of one image: full and cached ones, found by a run with a stand-in network.

    A tolerance may stop corrections earlier than here, so it is an upper bound for K > 1.
    """
    total = len(plan.sampler.timesteps)
    clock = Clock(total, plan.planned_full_steps())
    denoiser = Denoiser(_StandIn(), Condition(), clock)
    denoise(plan.sampler, denoiser, Noise(0, [0], plan.model.shape), plan.callbacks)
    return clock.evaluations


class _StandIn(nn.Module):
    """A prediction that changes with the sample, so that no correction converges."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(3 * sample)


def _count(assembly: Assembly, *, full: bool) -> int:
    model, clock = assembly.plan.model, assembly.clock
    condition = model.condition([0]).to(torch.device("meta"))
    denoiser = Denoiser(assembly.network, condition, clock)
    clock.full = full
    sample = torch.empty((1, *model.shape), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(sample, assembly.plan.sampler.timesteps[0])
    return int(counter.get_total_flops()) // 2
