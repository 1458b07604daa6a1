"""Placements of the inputs: copies that lie elsewhere, contests that go round them, and what their samples say."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from sweeps.paired import ratio, standing

MARGIN = 0.003


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
