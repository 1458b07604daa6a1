"""Tensor descriptors for the copy engine: (batch, seqlen, heads, head_dim) in blocks of rows of one head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flash_sink_attn.layout import clipping

_templates: dict[tuple[Any, ...], TensorDescriptor] = {}


def padded(head_dim: int) -> int:
    """The next power of two, at least 16: what a tile's side must be. The copy engine fills up with zeros."""
    return max(16, 1 << (head_dim - 1).bit_length())


def describe(x: torch.Tensor, rows: int, width: int, heads: int = 1, *, clipped: bool = True) -> TensorDescriptor:
    """Of ``rows`` rows of ``heads`` heads, ``width`` columns of each, of (batch, seqlen, heads, head_dim).

    Reads outside give zeros, writes are dropped; also beyond a sequence's end in a packed batch, (tokens, heads,
    head_dim), unless it is not ``clipped``: then it is one long sequence.
    """
    shape, strides = list(x.shape), list(x.stride())
    if len(shape) == 3 and not clipped:
        shape, strides = [1, *shape], [shape[0] * strides[0], *strides]
    elif len(shape) == 3:
        sizes, steps = clipping(shape[0], strides[0], x.element_size())
        shape, strides = [*sizes, *shape[1:]], [*steps, *strides[1:]]
    # Gluon checks what it makes; here that is done once per kind of tensor, since every launch pays.
    block = [*([1] * (len(shape) - 3)), rows, heads, width]
    key = (x.dtype, *block)
    template = _templates.get(key)
    if template is None:
        layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=len(shape))
        template = TensorDescriptor(x, shape, strides, block, layout)
        _templates[key] = copy.copy(template)
        _templates[key].base = None
        return template
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(template.__dict__, base=x, shape=shape, strides=strides)
    return made
