"""Tile configurations of the kernels and the one rule that says which of them can work.

The launcher and the sweep's search space both call :func:`reject_reason`; nothing else decides validity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kernel = Literal["fwd", "bwd_dq", "bwd_dkdv"]
KERNELS: tuple[Kernel, ...] = ("fwd", "bwd_dq", "bwd_dkdv")

BLOCK_SIZES = (16, 32, 64, 128, 256)
NUM_WARPS = (1, 2, 4, 8, 16)
MAX_HEAD_DIM = 256
REGISTERS_PER_SM = 65536


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Everything one kernel launch can choose.

    Attributes:
        BLOCK_M: query rows of a tile (query row x group head pairs when ``PACK_GQA``).
        BLOCK_N: keys of a tile.
        num_warps: warps of one program.
        num_stages: depth of Triton's load pipeline.
        PACK_GQA: ``fwd`` and ``bwd_dq`` only; one tile holds all query heads of a key head, so K and V are read once
            per group.
        SPLIT_LOOPS: walk the window edge, the interior and the diagonal in loops of their own, so that interior tiles
            carry no mask; otherwise one loop with the full mask.
        maxnreg: cap on registers per thread, None for the compiler's own choice.
        TMA: stream tiles through tensor descriptors (the copy engine of Hopper and later) instead of pointers: K and V,
            in ``bwd_dkdv`` q and do. Tensors whose strides are no multiple of 16 bytes use pointers all the same.
        REGISTER_A: keep the tile that stays (q; q and do in ``bwd_dq``; k and v in ``bwd_dkdv``) in registers, where
            the matrix instruction can take its first operand from, instead of in shared memory, which it then reads
            for every step. With TMA that tile comes through descriptors, too.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 2
    PACK_GQA: bool = False
    SPLIT_LOOPS: bool = True
    maxnreg: int | None = None
    TMA: bool = False
    REGISTER_A: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TileConfig:
        """The inverse of :meth:`to_dict`; fields left out take their defaults.

        Raises:
            ValueError: an unknown field, or BLOCK_M or BLOCK_N missing.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"config: unknown field {unknown[0]!r}, expected a subset of {known}")
        missing = sorted({"BLOCK_M", "BLOCK_N"} - set(fields))
        if missing:
            raise ValueError(f"config: {missing[0]} is missing, got {dict(fields)}")
        return cls(**fields)


    def encode(self) -> str:
        """All fields as text that :meth:`decode` reads; plain enough for torch.compile to trace."""
        return (f"{self.BLOCK_M},{self.BLOCK_N},{self.num_warps},{self.num_stages},{int(self.PACK_GQA)},"
                f"{int(self.SPLIT_LOOPS)},{self.maxnreg or 0},{int(self.TMA)},{int(self.REGISTER_A)}")

    @classmethod
    def decode(cls, text: str) -> TileConfig:
        """The inverse of :meth:`encode`."""
        m, n, warps, stages, pack, split, maxnreg, tma, register_a = map(int, text.split(","))
        return cls(m, n, warps, stages, bool(pack), bool(split), maxnreg or None, bool(tma), bool(register_a))


@dataclasses.dataclass(frozen=True)
class AttnConfig:
    """Tile configurations of one attention call; None leaves that kernel to the tuned table or the heuristic."""

    fwd: TileConfig | None = None
    bwd_dq: TileConfig | None = None
    bwd_dkdv: TileConfig | None = None

    @classmethod
    def everywhere(cls, tile: TileConfig) -> AttnConfig:
        """One tile for all kernels, without PACK_GQA where that is no choice."""
        t = tile
        unpacked = TileConfig(t.BLOCK_M, t.BLOCK_N, t.num_warps, t.num_stages, False, t.SPLIT_LOOPS, t.maxnreg, t.TMA,
                              t.REGISTER_A)
        return cls(fwd=tile, bwd_dq=tile, bwd_dkdv=unpacked)

    def encode(self) -> str:
        """As text that :meth:`decode` reads; plain enough for torch.compile to trace."""
        return ";".join(["" if c is None else c.encode() for c in (self.fwd, self.bwd_dq, self.bwd_dkdv)])

    @classmethod
    def decode(cls, text: str) -> AttnConfig:
        """The inverse of :meth:`encode`."""
        return cls(*(TileConfig.decode(part) if part else None for part in text.split(";")))

    def to_dict(self) -> dict[str, Any]:
        """Only the kernels that are set, JSON-ready."""
        return {k: c.to_dict() for k in KERNELS if (c := getattr(self, k)) is not None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AttnConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key that is no kernel, or a bad tile configuration.
        """
        unknown = sorted(set(fields) - set(KERNELS))
        if unknown:
            raise ValueError(f"config: unknown kernel {unknown[0]!r}, expected a subset of {list(KERNELS)}")
        return cls(**{k: c if isinstance(c, TileConfig) else TileConfig.from_dict(c)
                      for k, c in fields.items() if c is not None})


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a GPU gives one program: shared memory in bytes, registers per thread, and whether it has TMA."""

    shared_bytes: int
    tma: bool
    registers_per_thread: int = 255


# Shared memory one block can opt in to, by compute capability (CUDA programming guide, technical specifications).
_SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


def limits_of(arch: int) -> Limits:
    """Limits of compute capability ``arch`` (90 for Hopper); an unknown one gets those of the smallest known."""
    return Limits(_SHARED_BYTES.get(arch, min(_SHARED_BYTES.values())), tma=arch >= 90)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Split a head dim into two power-of-two parts, (first, second), the second 0 where one part wastes no more.

    Tile sides are powers of two; 192 as 128 + 64 costs a quarter less than 192 padded to 256.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    first = padded // 2
    second = max(16, 1 << max(head_dim - first - 1, 0).bit_length()) if head_dim > first else 0
    return (first, second) if head_dim > 16 and 0 < second and first + second < padded else (padded, 0)


def reject_reason(
    config: TileConfig, kernel: Kernel, *, head_dim: int, head_dim_v: int, group: int, limits: Limits
) -> str | None:
    """Why ``config`` cannot work for ``kernel``, or None.

    Args:
        config: the candidate.
        kernel: "fwd", "bwd_dq" or "bwd_dkdv".
        head_dim, head_dim_v: of q and k, and of v and o.
        group: query heads per key head.
        limits: of the GPU, see :func:`limits_of`.

    The resource rules are lower bounds (tiles that must be resident at once, accumulators that must be in registers):
    what they reject cannot run, what they let pass may still be refused by the compiled kernel's true figures.
    """
    c = config
    for name, value, allowed in (("BLOCK_M", c.BLOCK_M, BLOCK_SIZES), ("BLOCK_N", c.BLOCK_N, BLOCK_SIZES),
                                 ("num_warps", c.num_warps, NUM_WARPS)):
        if value not in allowed:
            return f"{name} must be one of {allowed}, got {value}"
    if not 1 <= c.num_stages <= 8:
        return f"num_stages must be from 1 to 8, got {c.num_stages}"
    if c.maxnreg is not None and not 24 <= c.maxnreg <= limits.registers_per_thread:
        return f"maxnreg must be from 24 to {limits.registers_per_thread}, got {c.maxnreg}"
    if c.PACK_GQA and kernel == "bwd_dkdv":
        return "PACK_GQA is a choice of the kernels fwd and bwd_dq only"
    if c.PACK_GQA and group == 1:
        return "PACK_GQA without a head group is the same kernel"
    if c.TMA and not limits.tma:
        return "TMA needs compute capability 9.0 or higher"
    if c.TMA and not {head_dim, head_dim_v} <= {16, 32, 64, 128, 256}:
        return f"TMA needs head dims that are powers of two from 16, got {head_dim} and {head_dim_v}"
    if c.TMA and kernel == "bwd_dkdv" and c.BLOCK_M < 32:
        return f"TMA needs BLOCK_M of at least 32 (of row statistics it cannot load fewer), got {c.BLOCK_M}"
    d, dv = sum(split_head_dim(head_dim)), sum(split_head_dim(head_dim_v))
    threads = 32 * c.num_warps
    cap = min(c.maxnreg or limits.registers_per_thread, REGISTERS_PER_SM // threads)
    m, n = c.BLOCK_M, c.BLOCK_N
    # fp32 values alive across the main loop, and 2-byte tiles that must sit in shared memory together
    accumulators = {"fwd": m * dv + m * n, "bwd_dq": m * d + m * n, "bwd_dkdv": n * (d + dv) + m * n}[kernel]
    streamed = {"fwd": n * (d + dv), "bwd_dq": n * (d + dv), "bwd_dkdv": m * (d + dv)}[kernel]
    if accumulators > cap * threads:
        return (f"accumulators need {-(-accumulators // threads)} registers per thread, "
                f"{cap} are available with num_warps={c.num_warps}")
    shared = 2 * streamed * max(1, c.num_stages - 1)
    if shared > limits.shared_bytes:
        return f"tiles in flight need at least {shared} bytes of shared memory, the GPU has {limits.shared_bytes}"
    return None
