"""Tile configurations of the kernels and the one rule that says which of them can work.

The launcher and the sweep's search space both call :func:`reject_reason`; nothing else decides validity.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

Kernel = Literal["fwd", "bwd_dq", "bwd_dkdv", "hopper_fwd", "hopper_bwd"]
Impl = Literal["triton", "hopper"]
Pass = Literal["fwd", "bwd"]
# What each implementation launches for each pass, in order.
KERNELS_OF: dict[Impl, dict[Pass, tuple[Kernel, ...]]] = {
    "triton": {"fwd": ("fwd",), "bwd": ("bwd_dq", "bwd_dkdv")},
    "hopper": {"fwd": ("hopper_fwd",), "bwd": ("hopper_bwd",)},
}
IMPLS: tuple[Impl, ...] = ("triton", "hopper")
KERNELS: tuple[Kernel, ...] = tuple(k for of in KERNELS_OF.values() for kernels in of.values() for k in kernels)
PORTABLE: tuple[Kernel, ...] = tuple(k for kernels in KERNELS_OF["triton"].values() for k in kernels)

BLOCK_SIZES = (16, 32, 64, 128, 256)
NUM_WARPS = (1, 2, 4, 8, 16)
MAX_HEAD_DIM = 256
REGISTERS_PER_SM = 65536


_C = TypeVar("_C", bound="_Config")


class _Config:
    """What the configurations share: fields that are an int, a bool or None, as a dict and as text."""

    FIELDS: ClassVar[tuple[str, ...]]
    BLOCK_M: int
    BLOCK_N: int

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, JSON-ready."""
        return {name: getattr(self, name) for name in self.FIELDS}

    @classmethod
    def from_dict(cls: type[_C], fields: Mapping[str, Any]) -> _C:
        """The inverse of :meth:`to_dict`; fields left out take their defaults.

        Raises:
            ValueError: an unknown field, or BLOCK_M or BLOCK_N missing.
        """
        unknown = sorted(set(fields) - set(cls.FIELDS))
        if unknown:
            raise ValueError(f"config: unknown field {unknown[0]!r}, expected a subset of {list(cls.FIELDS)}")
        missing = sorted({"BLOCK_M", "BLOCK_N"} - set(fields))
        if missing:
            raise ValueError(f"config: {missing[0]} is missing, got {dict(fields)}")
        return cls(**fields)

    def encode(self) -> str:
        """All fields as text that :meth:`decode` reads; plain enough for torch.compile to trace."""
        return ",".join([_as_text(getattr(self, name)) for name in self.FIELDS])

    @classmethod
    def decode(cls: type[_C], text: str) -> _C:
        """The inverse of :meth:`encode`."""
        return cls(*(_from_text(value) for value in text.split(",")))


def _as_text(value: int | None) -> str:
    if value is None:
        return "-"
    if value is True or value is False:
        return "T" if value else "F"
    return f"{value}"


def _from_text(text: str) -> int | None:
    return {"-": None, "T": True, "F": False}[text] if text in "-TF" else int(text)


def _with_fields(cls: type[_C]) -> type[_C]:
    cls.FIELDS = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    return cls


@_with_fields
@dataclasses.dataclass(frozen=True)
class TileConfig(_Config):
    """Everything one launch of a portable kernel can choose.

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


@_with_fields
@dataclasses.dataclass(frozen=True)
class HopperFwdConfig(_Config):
    """Everything a launch of the Hopper forward can choose.

    Attributes:
        BLOCK_M: query rows of a tile, 64 per warpgroup that computes.
        BLOCK_N: keys of a block.
        num_stages: blocks of K, and of V, that shared memory holds, at least 2.
        Q_STAGES: tiles of q per warpgroup that shared memory holds; with 2 the next one is there when a tile ends.
        HEADS: 0: the warpgroups of a tile take consecutive tokens of one head. Else they take different heads of a
            group at the same 64 tokens, HEADS of them one after the other, and K and V are loaded once for all; where
            the keys of 64 tokens do not fit the ring (no window, or one too long for num_stages blocks), one head.
        PACK_HEADS: with HEADS, 2 or 4 heads of a group in one tile of 64 rows, of 32 or 16 tokens, since under a short
            window fewer tokens see fewer keys between them: one warpgroup takes 64 tokens of PACK_HEADS * HEADS heads
            piece by piece. Head dim 64 only; without a window, or with one that reaches back further than
            num_stages - 1 blocks, as if it were 0.
        SPLIT_LOOPS: walk the diagonal, the interior and the window's edge in loops of their own, so that blocks of the
            interior carry no mask; otherwise one loop with the full mask.
        SHARE_Q: the output leaves through q's shared memory instead of its own.
        PROGRAMS_PER_SM: 0 for one program per tile, else a persistent grid of that many programs per multiprocessor.
        maxnreg: registers per thread of the program as a whole, which the warpgroups divide anew; None for what fills
            a multiprocessor with one program (two with BLOCK_M 64, three without LOADER).
        LOADER: whether a warp beside the warpgroups loads. Without one a tile's one warpgroup, of BLOCK_M and BLOCK_N
            64, loads for itself into one slot of K and two of V, and half the threads are left for more programs; head
            dims 64 and 128 only.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_stages: int = 2
    Q_STAGES: int = 1
    HEADS: int = 0
    PACK_HEADS: int = 0
    SPLIT_LOOPS: bool = True
    SHARE_Q: bool = False
    PROGRAMS_PER_SM: int = 0
    maxnreg: int | None = None
    LOADER: bool = True

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute; with LOADER one more holds the warp that loads."""
        return self.BLOCK_M // 64

    @property
    def registers_per_thread(self) -> int:
        """What the program is compiled for, and its warpgroups divide: all that fit, where ``maxnreg`` does not say."""
        return self.maxnreg or ({1: 128, 2: 168, 3: 128, 4: 96}[self.warpgroups] if self.LOADER else 168)

    @property
    def warpgroup_registers(self) -> int:
        """Of each warpgroup that computes, once the loader's has given up all but HOPPER_LOADER_REGISTERS."""
        if not self.LOADER:
            return self.registers_per_thread
        shared = self.registers_per_thread * (self.warpgroups + 1) - HOPPER_LOADER_REGISTERS
        return shared // self.warpgroups // 8 * 8

    @property
    def num_warps(self) -> int:
        """Four per warpgroup, the loader's included."""
        return 4 * (self.warpgroups + self.LOADER)


class HopperBwdForm(enum.IntEnum):
    """How the Hopper backward makes dq, see :class:`HopperBwdConfig`."""

    ACCUMULATE = 0
    RECOMPUTE = 1
    SLIDE = 2


@_with_fields
@dataclasses.dataclass(frozen=True)
class HopperBwdConfig(_Config):
    """Everything a launch of the Hopper backward can choose.

    Attributes:
        BLOCK_M: query rows of a tile, 64; with FORM 1 of the kernel that makes dq, and there 128 for 64 tokens of two
            heads at once.
        BLOCK_N: keys of a tile, 64 per warpgroup: 128 with FORM 0, 64 or 128 with FORM 1, 192 with FORM 2. At head dims
            above 128, which have FORM 0 only, 64 for two warpgroups.
        num_stages: tiles of q and do that shared memory holds, at least 2 with FORM 0 and 1.
        maxnreg: registers per thread of the kernel that makes dk and dv, a choice with FORM 1 and 64 keys only; None
            for the form's own number.
        FORM: 0 to add dq up outside the program (five products per pair of tiles), 1 to make it in a kernel of its own
            (seven), 2 to slide over queries and keys at once (five): for head dim 64, windows of at most
            HOPPER_SLIDE_WINDOW keys, and queries and keys of the same lengths. The rule for configurations knows
            neither window nor lengths: a call that cannot slide is made with FORM 1, see :meth:`recomputing`.
        BUFFERS: tiles of dS that may wait for their product, 0 for the form's own number.
        SPLIT_GROUP: programs that share a group's query heads at the same keys, and with FORM 1 at the same queries:
            more programs where there are too few to keep the GPU busy, and one more launch to add up their dk and dv.
            1 with FORM 2 and at head dims above 128.
        DETERMINISTIC: for a FORM 0 that adds dq up in one order of keys, each program when its turn comes; not at head
            dims above 128. The other forms give the same bits each time by nature: False.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_stages: int = 2
    maxnreg: int | None = None
    FORM: int = 0
    BUFFERS: int = 0
    SPLIT_GROUP: int = 1
    DETERMINISTIC: bool = False

    @property
    def num_warps(self) -> int:
        """Four per warpgroup with keys, and four for the others: who loads, stores, or makes dq."""
        return 4 * max(self.BLOCK_N // 64, 2 if self.FORM == HopperBwdForm.ACCUMULATE else 1) + 4

    @property
    def reproducible(self) -> bool:
        """Whether the same inputs give the same bits."""
        return self.FORM > 0 or self.DETERMINISTIC

    def recomputing(self) -> HopperBwdConfig:
        """What makes a call that FORM 2 was chosen for and cannot do."""
        return HopperBwdConfig(64, 64, FORM=HopperBwdForm.RECOMPUTE)

    def buffers(self, width: int) -> int:
        """Tiles of dS in shared memory, for each 64 keys, where tiles are ``width`` columns wide."""
        if self.FORM == HopperBwdForm.RECOMPUTE:
            return 1
        if self.FORM == HopperBwdForm.ACCUMULATE and width > 64:
            return HOPPER_SHARED_DQ_BUFFERS
        return self.BUFFERS or {HopperBwdForm.ACCUMULATE: 3, HopperBwdForm.SLIDE: 2}[HopperBwdForm(self.FORM)]


AnyConfig = TileConfig | HopperFwdConfig | HopperBwdConfig
CONFIG_CLASS: dict[Kernel, type[TileConfig] | type[HopperFwdConfig] | type[HopperBwdConfig]] = {
    "fwd": TileConfig, "bwd_dq": TileConfig, "bwd_dkdv": TileConfig, "hopper_fwd": HopperFwdConfig,
    "hopper_bwd": HopperBwdConfig,
}


def reproducible(config: AnyConfig) -> bool:
    """Whether a kernel with this configuration gives the same bits each time."""
    return config.reproducible if isinstance(config, HopperBwdConfig) else True


@dataclasses.dataclass(frozen=True)
class AttnConfig:
    """Configurations of one attention call, by kernel; None leaves that kernel to the tuned table or the heuristic.

    Attributes:
        fwd, bwd_dq, bwd_dkdv: of the portable kernels (``impl="triton"``).
        hopper_fwd, hopper_bwd: of the Hopper kernels (``impl="hopper"``).
    """

    fwd: TileConfig | None = None
    bwd_dq: TileConfig | None = None
    bwd_dkdv: TileConfig | None = None
    hopper_fwd: HopperFwdConfig | None = None
    hopper_bwd: HopperBwdConfig | None = None

    @classmethod
    def everywhere(cls, tile: TileConfig) -> AttnConfig:
        """One tile for all portable kernels, without PACK_GQA where that is no choice."""
        return cls(fwd=tile, bwd_dq=tile, bwd_dkdv=dataclasses.replace(tile, PACK_GQA=False))

    def encode(self) -> str:
        """As text that :meth:`decode` reads; plain enough for torch.compile to trace."""
        return ";".join(["" if c is None else c.encode() for c in (
            self.fwd, self.bwd_dq, self.bwd_dkdv, self.hopper_fwd, self.hopper_bwd)])

    @classmethod
    def decode(cls, text: str) -> AttnConfig:
        """The inverse of :meth:`encode`."""
        return cls(**{kernel: CONFIG_CLASS[kernel].decode(part)  # type: ignore[arg-type]
                      for kernel, part in zip(KERNELS, text.split(";"), strict=True) if part})

    def to_dict(self) -> dict[str, Any]:
        """Only the kernels that are set, JSON-ready."""
        return {k: c.to_dict() for k in KERNELS if (c := getattr(self, k)) is not None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AttnConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key that is no kernel, or a bad configuration.
        """
        unknown = sorted(set(fields) - set(KERNELS))
        if unknown:
            raise ValueError(f"config: unknown kernel {unknown[0]!r}, expected a subset of {list(KERNELS)}")
        return cls(**{k: c if isinstance(c, CONFIG_CLASS[k]) else CONFIG_CLASS[k].from_dict(c)  # type: ignore[arg-type, index]
                      for k, c in fields.items() if c is not None})


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a GPU gives one program: shared memory in bytes, registers per thread, and whether it has TMA and the
    matrix instructions that only Hopper has."""

    shared_bytes: int
    tma: bool
    registers_per_thread: int = 255
    wgmma: bool = False


# Shared memory one block can opt in to, by compute capability (CUDA programming guide, technical specifications).
_SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


def limits_of(arch: int) -> Limits:
    """Limits of compute capability ``arch`` (90 for Hopper); an unknown one gets those of the smallest known."""
    return Limits(_SHARED_BYTES.get(arch, min(_SHARED_BYTES.values())), tma=arch >= 90, wgmma=arch == 90)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Split a head dim into two power-of-two parts, (first, second), the second 0 where one part wastes no more.

    Tile sides are powers of two; 192 as 128 + 64 costs a quarter less than 192 padded to 256.
    """
    padded = max(16, 1 << (head_dim - 1).bit_length())
    first = padded // 2
    second = max(16, 1 << max(head_dim - first - 1, 0).bit_length()) if head_dim > first else 0
    return (first, second) if head_dim > 16 and 0 < second and first + second < padded else (padded, 0)


def reject_reason(
    config: AnyConfig, kernel: Kernel, *, head_dim: int, head_dim_v: int, group: int, limits: Limits
) -> str | None:
    """Why ``config`` cannot work for ``kernel``, or None: the rule for every kernel there is.

    Args:
        config: the candidate.
        kernel: one of :data:`KERNELS`; ``config`` must be of its class.
        head_dim, head_dim_v: of q and k, and of v and o.
        group: query heads per key head.
        limits: of the GPU, see :func:`limits_of`.

    The resource rules are lower bounds (tiles that must be resident at once, accumulators that must be in registers):
    what they reject cannot run, what they let pass may still be refused by the compiled kernel's true figures.
    """
    if not isinstance(config, CONFIG_CLASS[kernel]):
        return f"expected a {CONFIG_CLASS[kernel].__name__}, got a {type(config).__name__}"
    shape = _Shape(head_dim, head_dim_v, group, limits)
    if isinstance(config, HopperFwdConfig):
        return hopper_fwd_reject_reason(config, shape)
    if isinstance(config, HopperBwdConfig):
        return hopper_bwd_reject_reason(config, shape)
    return _portable_reject_reason(config, kernel, shape)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the rules know of a call, see :func:`reject_reason`."""

    head_dim: int
    head_dim_v: int
    group: int
    limits: Limits


def _portable_reject_reason(c: TileConfig, kernel: Kernel, shape: _Shape) -> str | None:
    head_dim, head_dim_v, group, limits = shape.head_dim, shape.head_dim_v, shape.group, shape.limits
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


HOPPER_BLOCK_M = (64, 128, 192, 256)
HOPPER_BLOCK_N = (32, 64, 128)
HOPPER_LOADER_REGISTERS = 24  # the fewest a warp can have
HOPPER_OTHER_SHARED = 1536  # barriers, and what Triton hands the warpgroups


def _hopper_reject_reason(c: HopperFwdConfig | HopperBwdConfig, shape: _Shape) -> str | None:
    if not shape.limits.wgmma:
        return "the Hopper kernels need compute capability 9.0"
    if (shape.head_dim, shape.head_dim_v) not in HOPPER_HEAD_DIMS:
        return (f"the Hopper kernels have head dims {', '.join(f'{d}/{dv}' for d, dv in HOPPER_HEAD_DIMS)}, "
                f"got {shape.head_dim}/{shape.head_dim_v}")
    if not 1 <= c.num_stages <= 8:
        return f"num_stages must be from 1 to 8, got {c.num_stages}"
    if c.maxnreg is not None and not 24 <= c.maxnreg <= shape.limits.registers_per_thread:
        return f"maxnreg must be from 24 to {shape.limits.registers_per_thread}, got {c.maxnreg}"
    if c.maxnreg is not None and 32 * c.num_warps * (-(-c.maxnreg // 8) * 8) > REGISTERS_PER_SM:
        most = REGISTERS_PER_SM // (32 * c.num_warps) // 8 * 8
        return f"maxnreg must be at most {most} with {c.num_warps} warps, got {c.maxnreg}"
    return None


HOPPER_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))


def hopper_fwd_reject_reason(c: HopperFwdConfig, shape: _Shape) -> str | None:
    """The part of :func:`reject_reason` for ``hopper_fwd``."""
    for name, value, allowed in (("BLOCK_M", c.BLOCK_M, HOPPER_BLOCK_M), ("BLOCK_N", c.BLOCK_N, HOPPER_BLOCK_N),
                                 ("Q_STAGES", c.Q_STAGES, (1, 2, 3, 4))):
        if value not in allowed:
            return f"{name} must be one of {allowed}, got {value}"
    if c.num_stages < 2:
        # a block of V is given back only once the next block of K has come, which the loader brings after it
        return f"num_stages must be at least 2, got {c.num_stages}"
    if not 0 <= c.PROGRAMS_PER_SM <= 8:
        return f"PROGRAMS_PER_SM must be from 0 to 8, got {c.PROGRAMS_PER_SM}"
    if c.HEADS < 0 or c.HEADS and (c.HEADS - 1) * c.warpgroups >= shape.group:
        return (f"HEADS must be from 0 to {-(-shape.group // c.warpgroups)}, the share of {c.warpgroups} warpgroups in "
                f"a group of {shape.group}, got {c.HEADS}")
    if c.PACK_HEADS:
        if (c.BLOCK_M, c.BLOCK_N, c.SHARE_Q) != (64, 64, False) or c.PACK_HEADS not in (2, 4):
            return (f"PACK_HEADS must be 0, 2 or 4, and needs BLOCK_M and BLOCK_N 64 and no SHARE_Q, got "
                    f"{c.PACK_HEADS}, {c.BLOCK_M}, {c.BLOCK_N} and {c.SHARE_Q}")
        if not c.HEADS or shape.group % (c.PACK_HEADS * c.HEADS):
            return (f"PACK_HEADS * HEADS must divide the group of {shape.group} query heads, got "
                    f"{c.PACK_HEADS} * {c.HEADS}")
        if (shape.head_dim, shape.head_dim_v) != (64, 64):
            return f"PACK_HEADS needs head dim 64, got {shape.head_dim} and {shape.head_dim_v}"
    if not c.LOADER:
        given = (c.BLOCK_M, c.BLOCK_N, c.num_stages, c.Q_STAGES, c.HEADS, c.SHARE_Q)
        if given != (64, 64, 2, 1, 0, False):
            return ("without LOADER, BLOCK_M, BLOCK_N, num_stages, Q_STAGES, HEADS and SHARE_Q must be 64, 64, 2, 1, 0 "
                    f"and False, got {', '.join(map(str, given))}")
        if (shape.head_dim, shape.head_dim_v) not in ((64, 64), (128, 128)):
            return f"without LOADER, head dims must be 64 or 128, got {shape.head_dim} and {shape.head_dim_v}"
    if (reason := _hopper_reject_reason(c, shape)) is not None:
        return reason
    first, second = split_head_dim(shape.head_dim)
    dv = sum(split_head_dim(shape.head_dim_v)) if shape.head_dim_v & (shape.head_dim_v - 1) == 0 else (
        1 << (shape.head_dim_v - 1).bit_length())
    if c.SHARE_Q and first != dv:
        return f"SHARE_Q needs a q tile as wide as the output's, got {first} and {dv}"
    # what the assembler asks for one matrix instruction, before the warpgroups divide the registers anew (C7602)
    single = max(dv // 2 + 30, c.BLOCK_N // 2 + 26)
    if single > c.registers_per_thread:
        return f"a matrix instruction needs {single} registers per thread, {c.registers_per_thread} are available"
    # fp32 accumulators of S and O, and two tiles of P in half precision, one being read, one being made
    needed, available = (dv + c.BLOCK_N) // 2 + c.BLOCK_N // 4, c.warpgroup_registers
    # and the rest: without LOADER also where the next blocks lie. With 96 of 128 the assembler serialises the products
    if needed + (16 if c.LOADER else 48) > available:
        return f"accumulators need {needed} registers per thread, {available} are available"
    shared = 2 * (c.BLOCK_M * (c.Q_STAGES * (first + second) + (0 if c.SHARE_Q or not c.LOADER else dv))
                  + c.BLOCK_N * ((c.num_stages - (not c.LOADER)) * (first + second) + c.num_stages * dv)
                  ) + HOPPER_OTHER_SHARED
    if shared > shape.limits.shared_bytes:
        return f"tiles need {shared} bytes of shared memory, the GPU has {shape.limits.shared_bytes}"
    return None


HOPPER_BWD_HEAD_DIMS = HOPPER_HEAD_DIMS
HOPPER_SLIDE_WINDOW = 129  # what 64 queries see of it is in three blocks of 64 keys
HOPPER_SHARED_DQ_BUFFERS = 4  # where two warpgroups make dq together, by the order of their turns


def hopper_bwd_width(head_dim: int) -> int:
    """Columns of a tile in the Hopper backward: a head dim and what the copy engine fills up."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else head_dim


def hopper_bwd_reject_reason(c: HopperBwdConfig, shape: _Shape) -> str | None:
    """The part of :func:`reject_reason` for ``hopper_bwd``."""
    if c.FORM not in tuple(HopperBwdForm):
        return f"FORM must be one of {tuple(map(int, HopperBwdForm))}, got {c.FORM}"
    form = HopperBwdForm(c.FORM)
    if shape.head_dim > 128:
        return _hopper_bwd_wide_reason(c, form, shape)
    sizes = {HopperBwdForm.ACCUMULATE: ((64,), (128,)), HopperBwdForm.RECOMPUTE: ((64, 128), (64, 128)),
             HopperBwdForm.SLIDE: ((64,), (192,))}[form]
    for name, value, allowed in (("BLOCK_M", c.BLOCK_M, sizes[0]), ("BLOCK_N", c.BLOCK_N, sizes[1])):
        if value not in allowed:
            return f"{name} must be one of {allowed} with FORM {c.FORM}, got {value}"
    if c.DETERMINISTIC and form != HopperBwdForm.ACCUMULATE:
        return f"DETERMINISTIC must be False with FORM {c.FORM}, which gives the same bits each time by nature"
    if (reason := _hopper_reject_reason(c, shape)) is not None:
        return reason
    heads = -(-shape.group // max(c.SPLIT_GROUP, 1))
    if c.SPLIT_GROUP < 1 or -(-shape.group // heads) != c.SPLIT_GROUP:
        return (f"SPLIT_GROUP must leave each program a share of the group of {shape.group} query heads, got "
                f"{c.SPLIT_GROUP}")
    if c.SPLIT_GROUP > 1 and form == HopperBwdForm.SLIDE:
        return f"SPLIT_GROUP must be 1 with FORM 2, got {c.SPLIT_GROUP}"
    if form == HopperBwdForm.SLIDE and shape.head_dim != 64:
        return f"FORM 2 needs head dim 64, got {shape.head_dim}"
    if form == HopperBwdForm.SLIDE and shape.group == 1:
        # its inner loop, over the group's heads, is then none, and ptxas lets every matrix product wait for the last
        return "FORM 2 needs a group of two heads or more"
    if c.BLOCK_M == 128 and shape.group == 1:
        return "BLOCK_M 128 needs a group of two heads or more"
    width = hopper_bwd_width(shape.head_dim)
    if form != HopperBwdForm.SLIDE and c.num_stages < 2:
        return (f"num_stages must be at least 2 with FORM {c.FORM} (a tile begins before the last is done), got "
                f"{c.num_stages}")
    return _hopper_bwd_counts_reason(c, form, width) or _hopper_bwd_shared_reason(c, form, width, shape.limits)


def _hopper_bwd_wide_reason(c: HopperBwdConfig, form: HopperBwdForm, shape: _Shape) -> str | None:
    """The part of :func:`hopper_bwd_reject_reason` for head dims above 128, which have a kernel of their own."""
    if (reason := _hopper_reject_reason(c, shape)) is not None:
        return reason
    if form != HopperBwdForm.ACCUMULATE:
        return f"head dims above 128 have FORM 0 only, whose dq differs from run to run, got FORM {c.FORM}"
    if (c.BLOCK_M, c.BLOCK_N) != (64, 64):
        return f"BLOCK_M and BLOCK_N must be 64 at head dims above 128, got {c.BLOCK_M} and {c.BLOCK_N}"
    if c.num_stages < 2:
        return f"num_stages must be at least 2 with FORM 0 (a tile begins before the last is done), got {c.num_stages}"
    for name, value, only in (("BUFFERS", c.BUFFERS, 0), ("maxnreg", c.maxnreg, None),
                              ("SPLIT_GROUP", c.SPLIT_GROUP, 1), ("DETERMINISTIC", c.DETERMINISTIC, False)):
        if value != only:
            return f"{name} must be {only} at head dims above 128, got {value}"
    # K and V, the ring of q, do and their rows' statistics, a tile of P and two of dS
    shared = (2 * 64 * (shape.head_dim + shape.head_dim_v) * (1 + c.num_stages) + 512 * c.num_stages + 3 * 2 * 64 * 64
              + HOPPER_OTHER_SHARED)
    if shared > shape.limits.shared_bytes:
        return f"tiles need {shared} bytes of shared memory, the GPU has {shape.limits.shared_bytes}"
    return None


def _hopper_bwd_counts_reason(c: HopperBwdConfig, form: HopperBwdForm, width: int) -> str | None:
    """What is wrong with BUFFERS or maxnreg."""
    if not 0 <= c.BUFFERS <= 8:
        return f"BUFFERS must be from 0 to 8, got {c.BUFFERS}"
    if c.BUFFERS and form == HopperBwdForm.RECOMPUTE:
        return f"BUFFERS must be 0 with FORM 1, which has none, got {c.BUFFERS}"
    if form == HopperBwdForm.ACCUMULATE and width > 64 and c.BUFFERS not in (0, HOPPER_SHARED_DQ_BUFFERS):
        return f"BUFFERS must be 0 or {HOPPER_SHARED_DQ_BUFFERS} with FORM 0 at head dims above 64, got {c.BUFFERS}"
    if c.maxnreg is None:
        return None
    if form != HopperBwdForm.RECOMPUTE or c.BLOCK_N != 64:
        return f"maxnreg must be None but with FORM 1 and BLOCK_N 64, got {c.maxnreg}"
    # one warpgroup takes what the loader's leaves: dk, dv, S and dP, and 40 registers for all else
    least = (2 * width // 2 + 64 + 40 + HOPPER_LOADER_REGISTERS) // 2
    if not least <= c.maxnreg <= 136 or c.maxnreg % 8:
        return f"maxnreg must be a multiple of 8 from {least} to 136 here, got {c.maxnreg}"
    return None


def _hopper_bwd_shared_reason(c: HopperBwdConfig, form: HopperBwdForm, width: int, limits: Limits) -> str | None:
    tile, ds = 2 * 64 * width, 2 * 64 * 64
    keys, statistics = c.BLOCK_N // 64, 512 * c.num_stages
    if form == HopperBwdForm.SLIDE:
        shared = tile * (2 * 4 + 3 * c.num_stages) + ds * keys * c.buffers(width) + statistics
    else:
        shared = tile * 2 * (keys + c.num_stages) + statistics
        if form == HopperBwdForm.ACCUMULATE:
            shared += ds * keys * c.buffers(width)
        else:
            shared = max(shared, tile * (3 * c.BLOCK_M // 64 + 2 * 2))
    shared += HOPPER_OTHER_SHARED
    if shared > limits.shared_bytes:
        return f"tiles need {shared} bytes of shared memory, the GPU has {limits.shared_bytes}"
    return None
