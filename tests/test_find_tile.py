"""The map from programs to tiles of packed sequences, against a loop."""

from __future__ import annotations

import random

import pytest
import torch

from flash_sink_attn.kernels.common import find_tile
from tests.kernel_calls import DEVICE

import triton  # isort: skip  (the package sets how kernels run, before any triton.jit)
import triton.language as tl  # isort: skip

BLOCK = 16


@triton.jit
def _find_kernel(Out, Programs, CuSeqlens, batch, total, ROWS_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    b, tile = find_tile(CuSeqlens, batch, total, tl.load(Programs + n), ROWS_PER_TOKEN, BLOCK)
    tl.store(Out + 2 * n, b)
    tl.store(Out + 2 * n + 1, tl.where(b < batch, tile, -1))


@pytest.mark.parametrize("rows_per_token", [1, 3])
@pytest.mark.parametrize("batch", [1, 31, 33, 128, 129, 300, 513, 770])
def test_every_tile_is_found_once(batch: int, rows_per_token: int) -> None:
    draw = random.Random(batch)
    lengths = [draw.choice([0, 0, 1, 5, 16, 17, 40]) for _ in range(batch)]
    expected = [(b, tile) for b, n in enumerate(lengths) for tile in range(-(-n * rows_per_token // BLOCK))]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)
    expected += [(batch, -1)] * 3  # some programs have no tile
    programs = list(range(len(expected)))
    if DEVICE != "cuda" and len(expected) > 200:
        # the interpreter, which has no warps, runs one after the other: all where a chunk begins or ends
        programs = [n for n in programs if expected[n][0] % 128 in (127, 0) or n < 8
                    or n > len(expected) - 8 or draw.random() < 0.01]
    out = torch.full((len(programs), 2), -7, dtype=torch.int32, device=DEVICE)
    _find_kernel[(len(programs),)](out, torch.tensor(programs, dtype=torch.int32, device=DEVICE), cu_seqlens, batch,
                                   sum(lengths), rows_per_token, BLOCK)
    assert list(map(tuple, out.tolist())) == [expected[n] for n in programs]
