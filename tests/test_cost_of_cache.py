"""A cached evaluation takes its share of the time, not only of the arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.clock import Clock
from iec_eval.efficiency.deepcache import CachedUNet

REPETITIONS = 9


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 3])
@torch.inference_mode()
def test_time_of_a_cached_evaluation_is_its_share_of_the_arithmetic(cut: int) -> None:
    """Within 15 %, on a network of convolutions large enough to measure."""
    clock = Clock(2, [0])
    cached = CachedUNet(large_network(), cut, clock)
    sample, when = torch.randn(2, 3, 32, 32), torch.full((2,), 500.0)

    def evaluate(full: bool) -> Tensor:
        clock.full = full
        output: Tensor = cached(sample, when)
        return output

    with one_thread():
        evaluate(True)
        share = flops(lambda: evaluate(False)) / flops(lambda: evaluate(True))
        # in pairs, so that whatever slows the machine down for a while slows both; processor time,
        # so that waiting for it does not count
        pairs = [(seconds(lambda: evaluate(False)), seconds(lambda: evaluate(True)))
                 for _ in range(REPETITIONS)]  # fmt: skip
    measured = median(short / long for short, long in pairs)
    assert 0.2 < share < 0.8
    assert measured == pytest.approx(share, rel=0.15)


def large_network() -> Any:
    """As wide at every level, so that norms take the same part of the time everywhere."""
    network: Any = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(96, 96, 96),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
    )
    return network.eval()


def flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
