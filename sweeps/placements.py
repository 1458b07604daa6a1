"""Placements: the same inputs in other memory, since where tensors lie is a part of how long a short kernel takes.

How addresses spread over the slices of the L2 cache and the channels of the memory depends on the physical pages, and
on the place within one. So a further placement lies in memory of its own, beside the others, which stay; and each of
its tensors begins some way into that memory, another one for every placement and tensor, so that all of them lie
differently modulo large powers of two, to each other as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sweeps.implementation import Inputs

if TYPE_CHECKING:
    import torch

PLACING = "placements"  # the worker's stage in which they are made

_ALIGNED = 512          # bytes: where Torch lets memory begin, and so where callers' tensors do
_STEP = 677 * _ALIGNED  # an odd count, so that its multiples differ modulo any power of two above _ALIGNED
_PAGE = 2 << 20         # bytes of a page of device memory, beyond which a step leads nowhere new


def moved(inputs: Inputs, number: int) -> Inputs:
    """A copy of the inputs on the placement of that number, 1 or above; number 0 is where they are.

    Every tensor keeps shape, strides and alignment (512 bytes), and takes up to 2 MiB more than its size.

    Raises:
        ValueError: the number is below 1.
    """
    if number < 1:
        raise ValueError(f"number: expected at least 1, got {number}")
    copies: dict[str, Any] = {name: _copy(x, number * (2 * rank + 1) * _STEP % _PAGE)
                              for rank, (name, x) in enumerate(_tensors(inputs).items())}
    return dataclasses.replace(inputs, **copies)


def nbytes(inputs: Inputs) -> int:
    """Bytes of a further placement of the inputs, at most."""
    return sum(_span(x) + _PAGE for x in _tensors(inputs).values())


def empty_beside(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Memory for a result, contiguous, that begins as far into memory of its own as ``x`` does.

    Args:
        x: an input; on the first placement it begins where its memory does, and so does the result.
        shape: of the result.
        dtype: default that of ``x``.
    """
    import torch

    dtype = dtype or x.dtype
    into = x.storage_offset() * x.element_size() // _ALIGNED * _ALIGNED
    memory = torch.empty(into + math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=x.device)
    return memory[into:].view(dtype).view(*shape)


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    import torch

    found = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}


def _span(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


def _copy(x: torch.Tensor, into: int) -> torch.Tensor:
    import torch

    memory = torch.empty(into + _span(x), dtype=torch.uint8, device=x.device)
    return memory[into:].view(x.dtype).as_strided(x.shape, x.stride()).copy_(x)
