"""Sections of the Hopper forward's grid: the rule counts what the programs of a persistent grid get to do."""

from __future__ import annotations

import random

import pytest

from flash_sink_attn.estimate import longest_program
from flash_sink_attn.hopper.sections import key_heads


def longest_by_tiles(costs: list[int], of: list[int], programs: int) -> int:
    """As common.tile_of_round numbers them, tile by tile."""
    tiles = [cost for tiles in of for cost in costs for _ in range(tiles)]
    work = [0] * programs
    for number, cost in enumerate(tiles):
        turn, at = divmod(number, programs)
        work[programs - 1 - at if turn % 2 else at] += cost
    return max(work)


def test_the_longest_program_is_what_tile_by_tile_comes_out() -> None:
    draw = random.Random(0)
    for _ in range(200):
        costs = sorted((draw.randint(1, 40) for _ in range(draw.randint(1, 12))), reverse=True)
        of = [draw.randint(1, 30) for _ in range(draw.randint(1, 4))]
        programs = draw.choice((1, 7, 12, 132))
        assert longest_program(costs, of, programs) == longest_by_tiles(costs, of, programs), (costs, of, programs)


def causal(heads: int, group: int, tokens: int, head_dim: int, block_m: int = 128, block_n: int = 128,
           programs: int = 132) -> int:
    return key_heads(heads, group, tokens * 4 * head_dim, tokens, tokens, None, block_m, block_n, programs)


@pytest.mark.parametrize(("heads", "group", "tokens", "head_dim", "block_m", "wanted"), [
    # what was the fastest on an H200 of the sections that were tried
    (22, 1, 3600, 128, 128, 22), (18, 1, 3900, 128, 128, 18), (32, 1, 4096, 128, 128, 11), (32, 1, 8192, 128, 128, 11),
    (26, 1, 3750, 64, 192, 26), (32, 1, 2048, 128, 128, 32),
    # K and V of all key heads in one section, where that has room
    (8, 8, 8192, 128, 128, 8), (4, 7, 4096, 128, 128, 4), (8, 8, 16384, 64, 192, 8),
    (8, 8, 16384, 128, 128, 4),  # 64 MB
])
def test_the_sections_that_were_measured_to_be_the_fastest(
    heads: int, group: int, tokens: int, head_dim: int, block_m: int, wanted: int
) -> None:
    assert causal(heads, group, tokens, head_dim, block_m) == wanted


def test_a_section_exists_for_whatever_comes() -> None:
    for heads in (1, 3, 40, 512):
        for tokens in (0, 1, 127, 5000):
            for keys in (0, 1, 300, 70000):
                for window in (None, 1, 128):
                    got = key_heads(heads, 4, keys * 1024, tokens, keys, window, 64, 64, 396)
                    assert 1 <= got <= heads
