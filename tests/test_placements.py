"""Placements of the inputs: copies that lie elsewhere, contests that go round them, and what their samples say."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sweeps.gate import gate_inputs
from sweeps.ours import TRITON
from sweeps.paired import ratio, standing
from sweeps.placements import empty_beside, moved, nbytes
from tests.test_runner import CASE

MARGIN = 0.003


# ---- other memory


@pytest.mark.parametrize("changes", [{}, {"varlen": "two", "seqlens": (5, 7), "sinks": False}])
def test_a_further_placement_is_the_same_inputs_in_other_memory(changes: dict[str, Any]) -> None:
    inputs = gate_inputs(dataclasses.replace(CASE, **changes), "cpu")
    inputs = dataclasses.replace(inputs, q=inputs.q.transpose(-1, -2).contiguous().transpose(-1, -2))
    copies = [inputs, *(moved(inputs, number) for number in range(1, 9))]
    names = [f.name for f in dataclasses.fields(inputs) if isinstance(getattr(inputs, f.name), torch.Tensor)]
    assert len(names) == 5 and {"q", "k", "v", "do"} < set(names)
    for copy in copies[1:]:
        assert (copy.window, copy.softmax_scale, copy.max_seqlen) == (
            inputs.window, inputs.softmax_scale, inputs.max_seqlen)
        for name in names:
            ours, theirs = getattr(copy, name), getattr(inputs, name)
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
            assert ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
        assert (copy.sinks is None) == (inputs.sinks is None)
    # how far into its memory each begins: aligned as callers' tensors are, and no two alike modulo a page
    into = {(number, name): getattr(copy, name).storage_offset() * getattr(copy, name).element_size()
            for number, copy in enumerate(copies) for name in names}
    assert all(x % 512 == 0 and x < 2 << 20 for x in into.values())
    for name in names:
        assert len({into[number, name] % (1 << 16) for number in range(len(copies))}) == len(copies)
    for number in range(1, len(copies)):
        assert len({into[number, name] for name in names}) == len(names)
    assert nbytes(inputs) >= max(sum(getattr(copy, name).untyped_storage().nbytes() for name in names)
                                 for copy in copies[1:])
    with pytest.raises(ValueError, match="number: expected at least 1, got 0"):
        moved(inputs, 0)


def test_a_result_lies_as_far_into_its_memory_as_the_input_it_is_beside() -> None:
    x = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)
    far = torch.empty(1 << 20, dtype=torch.bfloat16)[1280:1304].view(2, 3, 4)
    for source, into in ((x, 0), (far, 2560), (torch.empty(99, dtype=torch.int8)[33:], 0)):
        for dtype in (None, torch.float32):
            made = empty_beside(source, (2, 5), dtype)
            assert made.shape == (2, 5) and made.is_contiguous() and made.dtype == (dtype or source.dtype)
            assert made.storage_offset() * made.element_size() == into
    assert empty_beside(far, (0, 4)).shape == (0, 4)


def test_our_calls_compute_the_same_on_every_placement_into_memory_of_their_own() -> None:
    inputs = gate_inputs(CASE, "cpu")
    for pass_ in ("fwd", "bwd"):
        the_case = dataclasses.replace(CASE, pass_=pass_)
        first, second = (TRITON.prepare(the_case, {}, x) for x in (inputs, moved(inputs, 3)))
        first.run()
        second.run()
        for name, x in second.outputs().items():
            assert torch.equal(x, first.outputs()[name]) and x.data_ptr() != first.outputs()[name].data_ptr()
            assert x.storage_offset() > 0 or name == "dsinks"


# ---- what is made of the samples


def sampled(effects: Sequence[float], blocks: int, noise: float = 0.003, seed: int = 0
            ) -> tuple[list[list[float]], list[int]]:
    """Two contestants in so many blocks, the second slower by a share that each placement has of its own."""
    rng = random.Random(seed)
    places = [block % len(effects) for block in range(blocks)]
    first = [math.exp(rng.gauss(0, noise)) for _ in places]
    return [first, [(1 + effects[place]) * math.exp(rng.gauss(0, noise)) for place in places]], places


def test_one_whom_a_placement_contradicts_is_not_slower_however_many_blocks_there_are() -> None:
    """By Wilcoxon's interval of all blocks it is slower beyond doubt."""
    for effects in ((0.02, 0.02, 0.02, -0.015), (0.03, 0.03, 0.03, 0.001)):
        samples, places = sampled(effects, 400)
        assert standing(samples, MARGIN).tied == (0,)
        now = standing(samples, MARGIN, places)
        assert now.best == 0 and now.tied == (0, 1) and not now.decided
        alone, both = standing(samples, MARGIN).ratios[1], now.ratios[1]
        assert both.low < 1 + MARGIN < alone.low and both.low == pytest.approx(1 + effects[3], abs=0.002)
        assert both.high >= 1 + effects[0] - 0.002 > alone.high and both.ratio == alone.ratio
        assert both.half_width == alone.half_width == pytest.approx((alone.high - alone.low) / 2)


def test_one_who_is_slower_in_every_placement_is_slower() -> None:
    samples, places = sampled((0.03, 0.008, 0.02, 0.012), 400)
    now = standing(samples, MARGIN, places)
    assert now.tied == (0,) and now.decided and now.ratios[1].low == pytest.approx(1.008, abs=0.002)


def test_as_good_as_each_other_is_meant_of_every_placement() -> None:
    samples, places = sampled((0.01, -0.01), 400, noise=0.0005)
    assert not standing(samples, MARGIN, places).decided
    assert standing(sampled((0.0, 0.0), 400, noise=0.0005)[0], MARGIN, places).decided


def test_one_placement_is_as_none() -> None:
    samples, _ = sampled((0.004,), 40)
    assert standing(samples, MARGIN) == standing(samples, MARGIN, [0] * 40) == standing(samples, MARGIN, ())
    with pytest.raises(ValueError, match="placements: expected one for each of 40 pairs, got 39"):
        ratio(*samples, placements=[0] * 39)
    assert ratio(samples[0][:20], samples[1], placements=[0, 1] * 10).ratio > 0  # of those that both have
