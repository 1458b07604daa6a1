"""How far a tuned entry's shape is from a call's: the measure behind the nearest rung of the dispatcher.

Entries of another *family* are never taken. A family is a kernel, the padded head dims (what registers and shared
memory depend on), a window or none, and fixed lengths or packed ones. In an H100 run of 96 cases, as
``python -m sweeps ladder`` shows it, the best tile of another case at most :data:`FARTHEST` away is 0.9% slower than
the case's own best in the mean where all of these agree, 22% where one has a window and the other none, 31% where the
head dims differ; fixed lengths for packed ones and the reverse cost 1.4% in the mean and 28% in the worst case. The
dtype, both being 2 bytes wide, is only a distance.

Within a family the distance is a weighted sum of absolute differences of binary logarithms, see :data:`WEIGHTS`. What
decides is the work that is spread over the card: how many rows of the side that is tiled there are, which says how many
programs run at once. Beyond :data:`FARTHEST` an entry says less about a shape than the heuristic does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log2
from typing import NamedTuple

from flash_sink_attn.tuned_table import Entry, ShapeKey
from flash_sink_attn.validity import split_head_dim


class Features(NamedTuple):
    """What of a shape the best tile depends on within a family.

    Attributes:
        work: log2 of the rows that are tiled: batch x seqlen_q x heads_q for the forwards and ``bwd_dq``,
            batch x seqlen_k x heads_kv for ``bwd_dkdv`` and ``hopper_bwd``.
        heads: log2 of heads_q.
        group: log2 of the query heads per key head.
        keys: log2 of the keys a query sees at most: the window, or seqlen_k without one.
        dtype: 1 for float16, 0 for bfloat16.
    """

    work: float
    heads: float
    group: float
    keys: float
    dtype: float


# From leave-one-out on that run: of 300 random weightings those with the work first were the best (in the mean 0.3 to
# 0.5% slower than the best tile), and the others' weights hardly mattered while they were small. Without the work it
# was 1.2%, and 41% in the worst case: in bwd_dkdv with head dim 128 the best tile changes once the programs fill the
# card.
WEIGHTS = Features(work=2.0, heads=1.0, group=0.5, keys=0.5, dtype=0.5)
# An octave and a half of work. Over pairs of that run a borrowed tile was 0.9% slower than the best in the mean up to
# this distance, where the heuristic was 1.4%; from 3 to 4 it was 2.9% and the heuristic 0.9%.
FARTHEST = 3.0


def family(kernel: str, key: ShapeKey) -> tuple[str, int, int, bool, bool]:
    """(kernel, padded head dim, padded value head dim, windowed, varlen): what must be the same."""
    return (kernel, sum(split_head_dim(key.head_dim)), sum(split_head_dim(key.head_dim_v)), key.window is not None,
            key.varlen)


def features(kernel: str, key: ShapeKey) -> Features:
    """The logarithms that :func:`distance` compares."""
    rows = key.seqlen_k * key.heads_kv if kernel in ("bwd_dkdv", "hopper_bwd") else key.seqlen_q * key.heads_q
    keys = key.seqlen_k if key.window is None else min(key.window, key.seqlen_k)
    return Features(log2(max(1, key.batch * rows)), log2(key.heads_q), log2(key.heads_q / key.heads_kv),
                    log2(max(1, keys)), float(key.dtype == "float16"))


def distance(kernel: str, a: ShapeKey, b: ShapeKey) -> float:
    """How far two shapes of one family are apart; 0 for the same features."""
    return sum(weight * abs(x - y)
               for weight, x, y in zip(WEIGHTS, features(kernel, a), features(kernel, b), strict=True))


def nearest(
    kernel: str, key: ShapeKey, entries: Iterable[Entry], usable: Callable[[Entry], bool]
) -> tuple[Entry, float] | None:
    """The nearest of the entries that are of the shape's family and ``usable``, and its distance, however large.

    Of equally near ones the one with more work, whose tile has reached what it is for large shapes; then by key.
    """
    wanted, best = family(kernel, key), None
    for entry in entries:
        if family(entry.kernel, entry.key) != wanted:
            continue
        far = round(distance(kernel, key, entry.key), 9)
        rank = (far, -features(kernel, entry.key).work, _order(entry.key), entry.latency_ms)
        if (best is None or rank < best[0]) and usable(entry):
            best = rank, entry, far
    return None if best is None else best[1:]


def _order(key: ShapeKey) -> ShapeKey:
    return key._replace(window=key.window or 0)
