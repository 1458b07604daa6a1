"""Where a clipping descriptor has a packed batch's rows, and which tensors have one."""

from __future__ import annotations

import random

import pytest
import torch

from flash_sink_attn.layout import CLIP, clipping, describable


@pytest.mark.parametrize("element_size,unit", [(2, 8), (2, 7 * 64 + 8), (4, 4)])
def test_rows_are_where_they_should_be_and_what_is_beyond_a_sequence_is_beyond_a_dimension(
    element_size: int, unit: int,
) -> None:
    draw, tokens = random.Random(0), 100_000
    sizes, strides = clipping(tokens, unit, element_size)
    assert all(0 < stride * element_size < 2**40 and stride * element_size % 16 == 0 for stride in strides)
    assert max(sizes) <= 2**32
    for _ in range(200):
        start = draw.randrange(tokens)
        length = draw.randrange(tokens - start + 1)
        for r in (0, 1, max(length - 1, 0), length, length + 63, draw.randrange(tokens)):
            at = CLIP, start + length, CLIP - length + r
            inside = all(0 <= x < size for x, size in zip(at, sizes, strict=True))
            assert inside == (r < length)
            if inside:
                address = sum(x * stride * element_size for x, stride in zip(at, strides, strict=True)) % 2**64
                assert address == (start + r) * unit * element_size


def test_too_many_tokens_are_not_for_the_copy_engine() -> None:
    def packed(tokens: int) -> torch.Tensor:
        return torch.empty(tokens, 1, 8, dtype=torch.float16, device="meta")

    assert describable(packed(CLIP - 1)) and not describable(packed(CLIP))
    assert describable(packed(CLIP).unsqueeze(0))
