"""Tensor descriptors for the copy engine: (batch, seqlen, heads, head_dim) in blocks of rows of one head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_templates: dict[tuple[Any, ...], TensorDescriptor] = {}


def padded(head_dim: int) -> int:
    """The next power of two, at least 16: what a tile's side must be. The copy engine fills up with zeros."""
    return max(16, 1 << (head_dim - 1).bit_length())


def describe(x: torch.Tensor, rows: int, width: int, heads: int = 1) -> TensorDescriptor:
    """Of ``rows`` rows of ``heads`` heads, ``width`` columns of each, of (batch, seqlen, heads, head_dim).

    A packed batch, (tokens, heads, head_dim), is one long sequence. Reads outside give zeros, writes are dropped; but
    the copy engine knows nothing of where packed sequences end.
    """
    shape, strides = list(x.shape), list(x.stride())
    if len(shape) == 3:
        shape, strides = [1, *shape], [shape[0] * strides[0], *strides]
    # Gluon checks what it makes; here that is done once per kind of tensor, since every launch pays.
    key = (x.dtype, rows, width, heads)
    template = _templates.get(key)
    if template is None:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=4)
        template = TensorDescriptor(x, shape, strides, [1, rows, heads, width], layout)
        _templates[key] = copy.copy(template)
        _templates[key].base = None
        return template
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(template.__dict__, base=x, shape=shape, strides=strides)
    return made
