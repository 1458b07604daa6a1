"""How the tiles of a persistent forward are ordered: by sections of so many key heads that K and V stay in L2.

Within a section the longest tiles go first. A grid of persistent programs takes tiles in turn, forwards in one round
and backwards in the next (common.tile_of_round), which evens their lengths out as long as lengths fall from round to
round. Every section starts with long tiles again, wherever the round happens to be. So of the sections that L2 has
room for those are taken with which the program that has the most to do has the least.
"""

from __future__ import annotations

import functools

from flash_sink_attn.estimate import longest_program, tile_keys

# K and V of a section, of 50 MB of L2. With 64 and 128 MB in one section causal forwards of 32 heads of 4096 and 8192
# tokens took 1.05 and 1.04 of their time with sections of 22 and 44 MB (head dim 128, an H200).
_ROOM = 48 << 20
_NO_ROOM_COSTS = 1.05
_MORE = 3  # sections that are thought of beyond the fewest that have room


@functools.lru_cache(4096)
def key_heads(
    heads: int, tiles_per_head: int, head_bytes: int, seqlen_q: int, seqlen_k: int, window: int | None, block_m: int,
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
        block_m: query rows of a tile.
        programs: of the grid.
    """
    costs = tile_keys(seqlen_q, seqlen_k, window, block_m, block_n)
    fewest = -(-heads // max(1, _ROOM // max(1, head_bytes)))

    def time(section: int) -> float:
        sections = [tiles_per_head * min(section, heads - low) for low in range(0, heads, section)]
        return longest_program(costs, sections, programs) * (_NO_ROOM_COSTS if section * head_bytes > _ROOM else 1.0)

    counts = sorted({1, *range(fewest, min(heads, fewest + _MORE) + 1)})
    return min((-(-heads // count) for count in counts), key=time)
