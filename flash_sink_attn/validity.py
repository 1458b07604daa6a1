"""The one rule that says which configurations can work, for which shape, on which GPU.

The launcher and the sweep's search space both call :func:`reject_reason`; nothing else decides validity.
"""

from __future__ import annotations

import dataclasses

from flash_sink_attn.config import (
    BLOCK_SIZES,
    CONFIG_CLASS,
    HOPPER_LOADER_REGISTERS,
    HOPPER_SHARED_DQ_BUFFERS,
    NUM_WARPS,
    REGISTERS_PER_SM,
    TAIL_SIZES,
    AnyConfig,
    HopperBwdConfig,
    HopperBwdForm,
    HopperFwdConfig,
    Kernel,
    TileConfig,
)


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
    if c.TAIL_N and kernel != "fwd":
        return "TAIL_N is a choice of the kernel fwd only"
    if c.TAIL_N and not (c.TAIL_N in TAIL_SIZES and c.TAIL_N < c.BLOCK_N):
        return f"TAIL_N must be 0, or one of {TAIL_SIZES} and below BLOCK_N={c.BLOCK_N}, got {c.TAIL_N}"
    if c.BRANCH_MASKS and c.SPLIT_LOOPS:
        return "BRANCH_MASKS is a choice of one loop, without SPLIT_LOOPS"
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
    return _hopper_bwd_counts_reason(c, form, width) or _hopper_bwd_shared_reason(c, shape)


def _hopper_bwd_wide_reason(c: HopperBwdConfig, form: HopperBwdForm, shape: _Shape) -> str | None:
    """The part of :func:`hopper_bwd_reject_reason` for head dims above 128, which have a kernel of their own."""
    if (reason := _hopper_reject_reason(c, shape)) is not None:
        return reason
    if form != HopperBwdForm.ACCUMULATE:
        return f"head dims above 128 have FORM 0 only, got FORM {c.FORM}"
    if c.BLOCK_M != 64:
        return f"BLOCK_M must be 64 at head dims above 128, got {c.BLOCK_M}"
    if c.BLOCK_N != 64 and (c.BLOCK_N, shape.head_dim) != (128, 192):
        return f"BLOCK_N must be 64 at head dims above 128 (at 192 also 128, for two programs), got {c.BLOCK_N}"
    if c.num_stages < 2:
        return f"num_stages must be at least 2 with FORM 0 (a tile begins before the last is done), got {c.num_stages}"
    for name, value, only in (("BUFFERS", c.BUFFERS, 0), ("maxnreg", c.maxnreg, None),
                              ("SPLIT_GROUP", c.SPLIT_GROUP, 1)):
        if value != only:
            return f"{name} must be {only} at head dims above 128, got {value}"
    return _hopper_bwd_shared_reason(c, shape)


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


def hopper_bwd_shared(c: HopperBwdConfig, head_dim: int, head_dim_v: int) -> int:
    """Bytes of shared memory of a program of the Hopper backward, but for those of hopper.staging."""
    width, form = hopper_bwd_width(head_dim), HopperBwdForm(c.FORM)
    tile, ds = 2 * 64 * width, 2 * 64 * 64
    keys, statistics = c.BLOCK_N // 64, 512 * c.num_stages
    if head_dim > 128:
        # K and V, the ring of q, do and their rows' statistics, two tiles of P and two of dS
        shared = 2 * 64 * (head_dim + head_dim_v) * (1 + c.num_stages) + statistics + 4 * ds
        if keys == 2:  # the other program's K, and four tiles of dS more
            shared += 2 * 64 * head_dim + 4 * ds
    elif form == HopperBwdForm.SLIDE:
        shared = tile * (2 * 4 + 3 * c.num_stages) + ds * keys * c.buffers(width) + statistics
    else:
        shared = tile * 2 * (keys + c.num_stages) + statistics
        if form == HopperBwdForm.ACCUMULATE:
            shared += ds * keys * c.buffers(width)
        else:
            shared = max(shared, tile * (3 * c.BLOCK_M // 64 + 2 * 2))
    return shared + HOPPER_OTHER_SHARED


def _hopper_bwd_shared_reason(c: HopperBwdConfig, shape: _Shape) -> str | None:
    shared = hopper_bwd_shared(c, shape.head_dim, shape.head_dim_v)
    if shared > shape.limits.shared_bytes:
        return f"tiles need {shared} bytes of shared memory, the GPU has {shape.limits.shared_bytes}"
    return None
