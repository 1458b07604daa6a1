"""The sweep that one model needs: its shapes, and the tiles that are worth trying on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from sweeps.models import Attention, Model, ModelError
from sweeps.spec import SweepSpec

SEQLENS = (8192, 2048, 4096, 1024)      # in the order to run, should the time end before

_BOTH = [False, True]
# The neighbourhood of what has won on Hopper, see results/. Tiles that cannot work on a head dim cost nothing: they are
# rejected before anything is built, and what differs only in TMA where that is not possible is built once.
_CAUSAL: dict[str, Any] = {
    "fwd": [{"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": [2, 3], "TMA": True, "REGISTER_A": _BOTH},
            {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2, "TMA": True},
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": [4, 8], "num_stages": 2, "TMA": True}],
    "bwd_dq": [{"BLOCK_M": 64, "BLOCK_N": [32, 64], "num_warps": 4, "num_stages": 3, "TMA": True},
               {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 3, "maxnreg": [None, 168], "TMA": True,
                "REGISTER_A": True},
               {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "TMA": True}],
    "bwd_dkdv": [{"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": [2, 3], "SPLIT_LOOPS": False, "TMA": True,
                  "BRANCH_MASKS": True},
                 {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": [4, 8], "num_stages": 3, "SPLIT_LOOPS": False, "TMA": True,
                  "BRANCH_MASKS": True},
                 {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 3, "SPLIT_LOOPS": False, "maxnreg": 168, "TMA": True,
                  "BRANCH_MASKS": True}],
}
_WINDOW: dict[str, Any] = {
    "fwd": [{"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": [2, 3], "PACK_GQA": _BOTH, "SPLIT_LOOPS": False,
             "TMA": True, "TAIL_N": 16, "BRANCH_MASKS": True},
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2, "PACK_GQA": True, "SPLIT_LOOPS": False, "TMA": True,
             "REGISTER_A": _BOTH, "TAIL_N": 16, "BRANCH_MASKS": True},
            {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2, "PACK_GQA": _BOTH, "SPLIT_LOOPS": True, "TMA": True}],
    "bwd_dq": [{"BLOCK_M": 64, "BLOCK_N": [32, 64], "num_stages": [2, 3], "SPLIT_LOOPS": False, "TMA": True,
                "BRANCH_MASKS": True},
               {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2, "PACK_GQA": True, "SPLIT_LOOPS": False, "TMA": True}],
    "bwd_dkdv": [{"BLOCK_M": [32, 64], "BLOCK_N": 64, "num_stages": [2, 3], "SPLIT_LOOPS": False, "TMA": True,
                  "BRANCH_MASKS": True},
                 {"BLOCK_M": 32, "BLOCK_N": 64, "num_stages": 3, "SPLIT_LOOPS": False},
                 {"BLOCK_M": 16, "BLOCK_N": 64, "num_stages": 3, "SPLIT_LOOPS": False, "TMA": False}],
}
_POWERS = (16, 32, 64, 128, 256)
# The same for the Hopper kernels, by whether both head dims are at most 64.
_ALONE: dict[bool, dict[str, Any]] = {
    True: {"BLOCK_M": 64, "BLOCK_N": 64, "PROGRAMS_PER_SM": 4, "LOADER": False, "maxnreg": 128},
    False: {"BLOCK_M": 64, "BLOCK_N": 64, "PROGRAMS_PER_SM": 3, "LOADER": False}}
_HOPPER_CAUSAL: dict[bool, dict[str, Any]] = {
    True: {"hopper_fwd": [{"BLOCK_M": 192, "BLOCK_N": 128, "num_stages": 3, "PROGRAMS_PER_SM": [0, 1]},
                          {"BLOCK_M": 256, "BLOCK_N": 64, "num_stages": 4, "PROGRAMS_PER_SM": 1},
                          _ALONE[True]],
           "hopper_bwd": [{"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 3, "SPLIT_GROUP": [1, 2]},
                          {"BLOCK_M": 64, "BLOCK_N": 64, "FORM": 1}]},
    False: {"hopper_fwd": [{"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 2, "Q_STAGES": [1, 2], "PROGRAMS_PER_SM": 1},
                           {"BLOCK_M": 192, "BLOCK_N": 64, "num_stages": [3, 4], "SHARE_Q": True, "PROGRAMS_PER_SM": 1},
                           {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 2, "SHARE_Q": True, "PROGRAMS_PER_SM": 1},
                           {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2, "PROGRAMS_PER_SM": 2}, _ALONE[False]],
            "hopper_bwd": [{"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 2, "SPLIT_GROUP": [1, 2]},
                           {"BLOCK_M": 64, "BLOCK_N": 64, "FORM": 1}]},
}
_HOPPER_WINDOW: dict[bool, dict[str, Any]] = {
    True: {"hopper_fwd": [{"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 3, "Q_STAGES": 2, "HEADS": [1, 2],
                           "PACK_HEADS": 4, "maxnreg": 80},
                          {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2, "PROGRAMS_PER_SM": 3, "maxnreg": 80},
                          {"BLOCK_M": 192, "BLOCK_N": 64, "num_stages": 6, "Q_STAGES": 2, "PROGRAMS_PER_SM": 1},
                          {"BLOCK_M": 256, "BLOCK_N": 64, "num_stages": 4, "Q_STAGES": 2, "PROGRAMS_PER_SM": 1}],
           "hopper_bwd": [{"BLOCK_M": 64, "BLOCK_N": 192, "num_stages": [3, 4], "FORM": 2},
                          {"BLOCK_M": 64, "BLOCK_N": 64, "FORM": 1},
                          {"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 4}]},
    False: {"hopper_fwd": [{"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2, "Q_STAGES": [1, 2],
                            "SHARE_Q": _BOTH, "PROGRAMS_PER_SM": 2},
                           {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 5, "Q_STAGES": 2, "HEADS": 4,
                            "SHARE_Q": True, "PROGRAMS_PER_SM": 1},
                           {"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 2, "PROGRAMS_PER_SM": 1},
                           {"BLOCK_M": 192, "BLOCK_N": 64, "num_stages": 3, "Q_STAGES": [1, 2], "SHARE_Q": True,
                            "PROGRAMS_PER_SM": 1}, _ALONE[False]],
            "hopper_bwd": [{"BLOCK_M": 64, "BLOCK_N": 64, "FORM": 1},
                           {"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 2, "SPLIT_GROUP": [1, 4]}]},
}


def tune_spec(model: Model, seqlens: Sequence[int] = (), windows: Sequence[int | None] = ()) -> SweepSpec:
    """The sweep of a model: forward and backward of our kernels on each of its attentions, windows and lengths.

    Args:
        model: see :func:`sweeps.models.read_model`.
        seqlens: tokens of a sequence, batch 1, in the order to run; default :data:`SEQLENS`, those the model can do.
        windows: in place of the model's own; None = causal only.

    Raises:
        ModelError: a head dim that the kernels do not do.
    """
    lengths = tuple(seqlens) or tuple(n for n in SEQLENS if model.max_seqlen is None or n <= model.max_seqlen) or (
        (model.max_seqlen,) if model.max_seqlen else SEQLENS)
    groups: dict[str, Any] = {}
    for a in model.attentions:
        for dim in (a.head_dim, a.head_dim_v):
            if dim % 8 or dim > 256:
                raise ModelError(f"{model.name}: head dim: expected a multiple of 8, at most 256, got {dim}")
        for window, some in _workloads(tuple(windows) or a.windows, lengths):
            what = f"h{a.heads_q}x{a.heads_kv}-" + ("causal" if window is None else f"w{window}")
            groups[what] = {"shapes": {"heads": [[a.heads_q, a.heads_kv]], "head_dim": [[a.head_dim, a.head_dim_v]],
                                       "seqlen": some, "window": [window], "dtype": model.dtype},
                            "tunables": _tiles(a, window)}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"tune-{model.name}").strip("-.")
    return SweepSpec.model_validate({
        "name": name, "description": f"Block sizes for {model.name}.", "device": "cuda",
        "implementations": ["triton", "hopper"], "passes": ["fwd", "bwd"], "groups": groups,
        "timing": {"precision": 0.01, "max_ms": 80, "warmup_ms": 5, "wall_ms": 0}})


def read_numbers(option: str, text: str) -> tuple[int | None, ...]:
    """The numbers of a list such as ``1024,4096``; ``none`` stands for None.

    Args:
        option: what errors call it.

    Raises:
        ModelError: one of them is no number of at least 1.
    """
    found: list[int | None] = []
    for word in text.replace(",", " ").split():
        if word.lower() == "none":
            found.append(None)
        elif word.isdecimal() and int(word) > 0:
            found.append(int(word))
        else:
            raise ModelError(f"{option}: expected numbers of at least 1 with commas between them, got {text!r}")
    return tuple(found)


def _workloads(windows: Sequence[int | None], lengths: Sequence[int]) -> Iterator[tuple[int | None, list[int]]]:
    """Each window with the lengths on which it hides something; one that hides nothing is none, as in a call."""
    hiding = [(w, [n for n in lengths if w is None or n > w]) for w in windows]
    yield from ((w, some) for w, some in hiding if some)
    if None not in windows and any(not some for _, some in hiding):
        yield None, list(lengths)


def _tiles(a: Attention, window: int | None) -> dict[str, Any]:
    grids, hopper = (_CAUSAL, _HOPPER_CAUSAL) if window is None else (_WINDOW, _HOPPER_WINDOW)
    if not {a.head_dim, a.head_dim_v} <= set(_POWERS):
        # the copy engine needs powers of two: the same tiles without it
        grids = {kernel: [dict(grid, TMA=False) for grid in some] for kernel, some in grids.items()}
    return grids | hopper[max(a.head_dim, a.head_dim_v) <= 64] | {"combine": 1}
