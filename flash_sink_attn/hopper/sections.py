"""How the tiles of a persistent forward are ordered: by sections of so many key heads that K and V stay in L2.

Within a section the longest tiles go first. A grid of persistent programs takes tiles in turn, forwards in one round
and backwards in the next (common.tile_of_round), which evens their lengths out as long as lengths fall from round to
round. Every section starts with long tiles again, wherever the round happens to be. So of the sections that L2 has
room for those are taken with which the program that has the most to do has the least.
"""

from __future__ import annotations

import functools
from itertools import accumulate

# K and V of a section, of 50 MB of L2. With 64 and 128 MB in one section causal forwards of 32 heads of 4096 and 8192
# tokens took 1.05 and 1.04 of their time with sections of 22 and 44 MB (head dim 128, an H200).
_ROOM = 48 << 20
_NO_ROOM_COSTS = 1.05
_MORE = 3  # sections that are thought of beyond the fewest that have room
_TILE_KEYS = 128  # what a tile costs besides its keys, see estimate.rows_time


@functools.lru_cache(4096)
def key_heads(
    heads: int, tiles_per_head: int, head_bytes: int, seqlen_q: int, seqlen_k: int, window: int, block_m: int,
    block_n: int, programs: int,
) -> int:
    """The key heads of a section, of ``heads`` of a batch of one length.

    On an H200 a causal forward took, by the longest program's share of the mean one (32/32 heads x 128, 4096 tokens):
    32 heads 1.00 (0.227 ms), 16 1.21 (0.252), 11 1.01 (0.215), 8 1.64 (0.328); 22/22 x 128, 3600 tokens: 22 heads 1.03
    (0.133 ms), 18, which is all that 32 MB hold, 1.55 (0.182), 11 1.16 (0.145).

    Args:
        heads: key heads of all sequences.
        tiles_per_head: query heads of each, or sets of them that one program takes.
        head_bytes: of one's K and V.
        window: 0 = none.
        block_m: query rows of a tile.
        programs: of the grid.
    """
    costs = []  # of each tile of a head, in keys, the longest first
    for first in reversed(range(0, seqlen_q, block_m)):
        begin = max(0, first + seqlen_k - seqlen_q - window + 1) if window else 0
        end = min(seqlen_q, first + block_m) + seqlen_k - seqlen_q
        costs.append(_TILE_KEYS + max(0, -(-(end - begin) // block_n) * block_n))
    fewest = -(-heads // max(1, _ROOM // max(1, head_bytes)))
    best, least = heads, float("inf")
    for count in sorted({1, *range(fewest, min(heads, fewest + _MORE) + 1)}):
        section = -(-heads // count)
        sections = [tiles_per_head * min(section, heads - low) for low in range(0, heads, section)]
        time = _longest(costs, sections, programs) * (_NO_ROOM_COSTS if section * head_bytes > _ROOM else 1.0)
        if time < least:
            best, least = section, time
    return best


def _longest(costs: list[int], sections: list[int], programs: int) -> int:
    """What the program with the most to do costs: in each section so many tiles of each cost, one after the other."""
    steps = [0] * (programs + 1)  # how much more a program has to do than the one before it
    number = 0
    for tiles in sections:
        for cost in costs:
            left = tiles
            while left:
                turn, at = divmod(number, programs)
                count = min(left, programs - at)
                low = programs - at - count if turn % 2 else at
                steps[low] += cost
                steps[low + count] -= cost
                number += count
                left -= count
    return max(accumulate(steps))
