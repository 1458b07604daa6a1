"""Tile configurations of the kernels: what each launch can choose.

Which of them can work is what :mod:`flash_sink_attn.validity` says.
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
TAIL_SIZES = (16, 32, 64)
MAX_HEAD_DIM = 256
REGISTERS_PER_SM = 65536
HOPPER_LOADER_REGISTERS = 24  # the fewest a warp can have
HOPPER_SLIDE_WINDOW = 129  # what 64 queries see of it is in three blocks of 64 keys
HOPPER_SHARED_DQ_BUFFERS = 4  # where two warpgroups make dq together, by the order of their turns


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
            carry no mask; otherwise one loop, with the full mask or ``BRANCH_MASKS``.
        maxnreg: cap on registers per thread, None for the compiler's own choice.
        TMA: stream tiles through tensor descriptors (the copy engine of Hopper and later) instead of pointers: K and V,
            in ``bwd_dkdv`` q and do. Tensors whose strides are no multiple of 16 bytes use pointers all the same.
        REGISTER_A: keep the tile that stays (q; q and do in ``bwd_dq``; k and v in ``bwd_dkdv``) in registers, where
            the matrix instruction can take its first operand from, instead of in shared memory, which it then reads
            for every step. With TMA that tile comes through descriptors, too.
        TAIL_N: ``fwd`` only, 0, 16, 32 or 64 and below ``BLOCK_N``: if no more keys than this are left after the last
            whole tile, they are a tile of this width, loaded before the loop; 0 for one more tile of BLOCK_N.
        BRANCH_MASKS: one loop only: a tile gets a mask by a branch where the window's edge or the diagonal cuts it.
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
    TAIL_N: int = 0
    BRANCH_MASKS: bool = False

    def whole_tokens(self, group: int) -> bool:
        """Whether a tile of query rows ends with a token's last head, so that one copy can load it: not where the
        ``group`` heads that it packs do not divide it."""
        return not self.PACK_GQA or self.BLOCK_M % group == 0


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
            interior carry no mask; otherwise one loop, with the mask behind a branch: a fifth to a third less code.
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
            above 128, which have FORM 0 only, 64 for two warpgroups; at head dim 192 also 128 for two programs that are
            launched as a cluster and add one dq.
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
        DETERMINISTIC: for a FORM 0 that adds dq up in one order of keys, each program when its turn comes. The other
            forms give the same bits each time by nature: False.
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
        """One tile for all portable kernels, without PACK_GQA and TAIL_N where they are no choice."""
        return cls(fwd=tile, bwd_dq=dataclasses.replace(tile, TAIL_N=0),
                   bwd_dkdv=dataclasses.replace(tile, PACK_GQA=False, TAIL_N=0))

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
