"""How tokens lie in memory and form sequences: what the host side of every kernel asks of its tensors."""

from __future__ import annotations

import dataclasses

import torch

# Offsets inside a tile are 32-bit: at most 256 rows times a stride.
_MAX_STRIDE = 2**31 // 256 - 1
LOG2E = 1.4426950408889634
CLIP = 2**30     # see clipping; more tokens than a sequence has


@dataclasses.dataclass(frozen=True)
class Sequences:
    """How tokens form sequences.

    Fixed length: ``cu_seqlens_*`` None. Varlen: int32 (batch + 1,) on the device of the tensors.
    ``cu_seqlens_k`` None in a varlen call: the keys' are the queries'. ``seqlen_*`` are per sequence, or total token
    counts when varlen.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    def tiles(self, length: int, rows_per_token: int, block: int) -> int:
        """Tiles of one sequence, or an upper bound on those of all sequences when varlen."""
        return length * rows_per_token // block + self.batch if self.varlen else -(-length * rows_per_token // block)


def clipping(tokens: int, stride: int, element_size: int) -> tuple[list[int], list[int]]:
    """Sizes and strides of the three dimensions that a packed batch's tokens are in a descriptor that clips.

    The copy engine knows nothing of sequences, but beyond a dimension it fills in zeros and writes nothing. Row r of
    the sequence of ``length`` tokens that begins at token ``start`` is at (CLIP, start + length, CLIP - length + r):
    beyond the sequence that is beyond the third dimension. Addresses are sums modulo 2**64, in which all but (start +
    r) * stride cancels out (Triton's ragged descriptors do the same). r must not be negative; a load wholly outside
    touches the tensor's first address, and so a descriptor that begins before the tensor instead would crash there.
    """
    return [CLIP + 1, tokens + 1, CLIP], [2**34 // element_size - stride, stride, stride]


def launchable(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if the kernels can address it by strides, else a contiguous copy."""
    strides = x.stride()
    if strides[-1] == 1 and strides[-3] <= _MAX_STRIDE and strides[-2] <= _MAX_STRIDE:
        return x
    return x.contiguous()


def strides_of(*tensors: torch.Tensor) -> tuple[list[int], int]:
    """(batch, token, head) strides of all tensors in a row, in units of the second result.

    The batch stride of a varlen tensor is 0. The unit is 8 elements (16 bytes) where all strides allow it, else 1.
    """
    found: list[int] = []
    for x in tensors:
        s = x.stride()
        found += s[:3] if len(s) == 4 else (0, s[0], s[1])
    if any(value % 8 for value in found):
        return found, 1
    return [value // 8 for value in found], 8


def describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can address the tensors: 16-byte aligned, no dimension of size or stride 0, and of a
    packed batch fewer tokens than :func:`clipping` has room for."""
    return all(x.numel() and not x.data_ptr() % 16 and not any(stride % 8 or not stride for stride in x.stride()[:-1])
               and (x.dim() > 3 or x.shape[0] < CLIP) for x in tensors)
