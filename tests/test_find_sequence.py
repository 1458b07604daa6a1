"""The map from programs to tiles of packed sequences, against a loop, and what it does with offsets that are wrong."""

from __future__ import annotations

import random

import pytest
import torch

from flash_sink_attn.kernels.common import find_sequence
from flash_sink_attn.layout import Sequences
from tests.kernel_calls import DEVICE

import triton  # isort: skip  (the package sets how kernels run, before any triton.jit)
import triton.language as tl  # isort: skip

BLOCK = 16


@triton.jit
def _find_kernel(Out, Slots, CuSeqlens, batch, total, ROWS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, start, length, tile = find_sequence(CuSeqlens, batch, total, tl.load(Slots + n), ROWS_PER_TOKEN, BLOCK)
    tl.store(Out + 4 * n, b)
    tl.store(Out + 4 * n + 1, start)
    tl.store(Out + 4 * n + 2, length)
    tl.store(Out + 4 * n + 3, tile)


def _found(cu_seqlens: torch.Tensor, slots: list[int], total: int, rows_per_token: int) -> list[tuple[int, ...]]:
    out = torch.full((len(slots), 4), -7, dtype=torch.int32, device=DEVICE)
    _find_kernel[(len(slots),)](out, torch.tensor(slots, dtype=torch.int32, device=DEVICE), cu_seqlens.to(DEVICE),
                                len(cu_seqlens) - 1, total, rows_per_token, BLOCK)
    return list(map(tuple, out.tolist()))


@pytest.mark.parametrize("rows_per_token", [1, 3])
@pytest.mark.parametrize("batch", [1, 2, 33, 128, 770])
def test_every_tile_has_one_slot_and_is_found_there(batch: int, rows_per_token: int) -> None:
    draw = random.Random(batch)
    lengths = [draw.choice([0, 0, 1, 5, 16, 17, 40]) for _ in range(batch)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = sum(lengths)
    slots = list(range(Sequences(batch, total, total, cu_seqlens).tiles(total, rows_per_token, BLOCK)))
    sampled = DEVICE != "cuda" and len(slots) > 100
    if sampled:
        # the interpreter runs one program after the other
        slots = sorted({*slots[:8], *slots[-8:], *draw.sample(slots, 40)})
    tiles = set()
    for slot, (b, start, length, tile) in zip(slots, _found(cu_seqlens, slots, total, rows_per_token), strict=True):
        assert 0 <= b < batch and (start, length) == (cu_seqlens[b], lengths[b]), slot
        assert tile == slot - (start * rows_per_token // BLOCK + b) and tile >= 0
        if tile * BLOCK < length * rows_per_token:
            tiles.add((b, tile))
    if not sampled:
        assert tiles == {(b, t) for b, n in enumerate(lengths) for t in range(-(-n * rows_per_token // BLOCK))}


def test_a_token_times_its_rows_may_exceed_31_bits() -> None:
    cu_seqlens = torch.tensor([0, 2**30, 2**30 + 40], dtype=torch.int32)
    first = 2**30 * 8 // BLOCK + 1
    assert _found(cu_seqlens, [first - 2, first, first + 19], 2**30 + 40, 8) == [
        (0, 0, 2**30, first - 2), (1, 2**30, 40, 0), (1, 2**30, 40, 19)]


@pytest.mark.parametrize("offsets", [[0, 40, 8, 64], [-50, 10, 20, 64], [0, 1000, 2000, 3000], [64, 64, 0, 0],
                                     [70, -3, 2**31 - 1, -(2**31)]])
def test_wrong_offsets_lead_to_no_row_outside(offsets: list[int]) -> None:
    total = 64
    for b, start, length, _ in _found(torch.tensor(offsets, dtype=torch.int32), list(range(-1, 12)), total, 1):
        assert 0 <= b < 3 and 0 <= start <= total and length >= 0 and start + length <= total
