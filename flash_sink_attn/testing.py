"""Inputs and the error rule, shared by the tests and the sweep.

The rule, for each of o, lse, dq, dk, dv and dsinks: the distance to float64 is at most twice that of eager PyTorch in
the same dtype on the same inputs plus one rounding, and no single row is further off than ten times eager's worst row
plus one rounding. No tolerance is set by hand. What the words mean here:

* A distance is a 2-norm over everything compared, relative to the truth's norm. A row is one head's vector at one
  position; of lse and dsinks it is one number.
* One rounding is the unit roundoff of the half dtype (2^-8 bfloat16, 2^-11 float16) times the size of what is rounded,
  and half its smallest subnormal. The size is that of the terms a result is the sum of, if they cancel: a gradient that
  is zero on paper (window 1 without a sink) is judged by the terms that cancel.
* lse is float32 with the sum of the exponentials in float32 on either side: eager's differs from the truth by its
  half-precision logits. One rounding is what tensor cores leave of a dot product over 256 dims, 16 truncations of
  2^-23. The size of an lse is at least 1, because its absolute error is a relative error of the softmax.
* dsinks is float32 too, but every one of its terms has been through the half-precision o, so one rounding is that of
  the half dtype at the root-sum-square of the terms. Few heads make eager's distance a matter of luck, so it is not
  taken below what the errors of eager's terms give if they are independent.
* A row whose truth has no terms at all (no visible key) must be exactly zero; lse is minus infinity where the truth is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from flash_sink_attn.reference import attention_reference_gradients, eager_gradients

LSE_ROUNDING = 2.0**-19
# Below this fraction of its terms' size a result has cancelled to nothing and is measured against the terms.
CANCELLED = 1e-6


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """Fixed length: (batch, seqlen, heads, head_dim); varlen: (total_tokens, heads, head_dim) with int32 cu_seqlens.

    sinks is float32 (heads_q,) or None; do has the shape of o. None of them requires grad.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    do: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


def make_inputs(
    *,
    batch: int = 1,
    seqlen_q: int = 0,
    seqlen_k: int | None = None,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    seqlens: Sequence[int] | None = None,
    seqlens_k: Sequence[int] | None = None,
    sinks: bool = True,
    sink_scale: float = 1.0,
) -> AttentionInputs:
    """Standard normal q, k, v, do and sinks, drawn on the device (so the numbers differ between CPU and CUDA).

    Args:
        seqlen_k: default ``seqlen_q``. head_dim_v: default ``head_dim``.
        seqlens: lengths of the sequences of a varlen batch; then batch, seqlen_q and seqlen_k are not looked at.
        seqlens_k: of their keys, default ``seqlens``.
        sink_scale: standard deviation of the sinks.
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    meta = torch.device(device).type == "meta"  # which has no numbers to draw
    generator = None if meta else torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if meta:  # drawing none all the same would bring torch._dynamo, four seconds' worth
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def offsets(lengths: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    cu_seqlens_q = cu_seqlens_k = None
    lead_q: tuple[int, ...]
    lead_k: tuple[int, ...]
    if seqlens is None:
        seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
        lead_q, lead_k, max_q, max_k = (batch, seqlen_q), (batch, seqlen_k), seqlen_q, seqlen_k
    else:
        seqlens_k = seqlens if seqlens_k is None else seqlens_k
        if len(seqlens_k) != len(seqlens):
            raise ValueError(f"seqlens_k: expected {len(seqlens)} lengths as in seqlens, got {len(seqlens_k)}")
        cu_seqlens_q, cu_seqlens_k = offsets(seqlens), offsets(seqlens_k)
        lead_q, lead_k, max_q, max_k = (sum(seqlens),), (sum(seqlens_k),), max(seqlens), max(seqlens_k)
    return AttentionInputs(
        q=normal(*lead_q, heads_q, head_dim),
        k=normal(*lead_k, heads_kv, head_dim),
        v=normal(*lead_k, heads_kv, head_dim_v),
        sinks=normal(heads_q, dtype=torch.float32) * sink_scale if sinks else None,
        do=normal(*lead_q, heads_q, head_dim_v),
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
    )


def truth_and_eager(
    inputs: AttentionInputs,
    *,
    window: int | None = None,
    softmax_scale: float | None = None,
    dlse: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The two sides :func:`check` needs: ``attention_reference_gradients`` and ``eager_gradients`` of the inputs."""
    x = inputs
    truth, eager = (
        gradients(x.q, x.k, x.v, x.sinks, x.do, dlse=dlse, window=window, softmax_scale=softmax_scale,
                  cu_seqlens_q=x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k)
        for gradients in (attention_reference_gradients, eager_gradients)
    )
    return truth, eager


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``: 2^-8 for bfloat16, 2^-11 for float16."""
    return torch.finfo(dtype).eps / 2


def relative_error(x: torch.Tensor, x64: torch.Tensor) -> float:
    """2-norm of the difference over that of ``x64``; 0 for equal zeros, infinity where x is NaN or alone infinite."""
    distance, size = (float(torch.linalg.vector_norm(y)) for y in (_difference(x, x64), _finite(x64)))
    return distance / size if size else (math.inf if distance else 0.0)


def worst_row_error(x: torch.Tensor, x64: torch.Tensor) -> float:
    """The largest :func:`relative_error` of a row, rows being vectors over the last dimension."""
    distance, size = (torch.linalg.vector_norm(y, dim=-1) for y in (_difference(x, x64), _finite(x64)))
    return float(_ratio(distance, size).max()) if distance.numel() else 0.0


@dataclasses.dataclass(frozen=True)
class Expected:
    """What one output is judged by.

    Attributes:
        name: o, lse, dq, dk, dv or dsinks.
        truth: float64; its rows are vectors over the last dimension, of lse and dsinks numbers.
        row_size: size of each row, that of the terms it is the sum of.
        eager_distance: of each row, eager's distance to the truth.
    """

    name: str
    truth: torch.Tensor
    row_size: torch.Tensor
    eager_distance: torch.Tensor

    @functools.cached_property
    def size(self) -> float:
        """What relative errors are relative to: the truth's norm, or that of its terms if they cancel to nothing."""
        truth, terms = (float(torch.linalg.vector_norm(x)) for x in (_finite(self.truth), self.row_size))
        return truth if truth > CANCELLED * terms else terms

    @classmethod
    def joined(cls, pieces: Sequence[Expected]) -> Expected:
        """Pieces of one output as one, its rows in a single dimension."""
        name = pieces[0].name
        truth = [p.truth.reshape(-1) if name in ("lse", "dsinks") else p.truth.flatten(0, -2) for p in pieces]
        sizes, distances = ([getattr(p, x).reshape(-1) for p in pieces] for x in ("row_size", "eager_distance"))
        return cls(name, torch.cat(truth), torch.cat(sizes), torch.cat(distances))


def expected(name: str, truth: Mapping[str, torch.Tensor], eager: Mapping[str, torch.Tensor]) -> Expected:
    """Output ``name`` of the dicts that :func:`truth_and_eager` returns.

    The truth may lack what judges a row by its terms (o_scale ..., dsinks_rows_scale); its own size is taken then.
    """
    exact = truth[name].double()
    distance = _row_norm(name, _difference(eager[name], exact))
    size = _row_norm(name, _finite(exact))
    if name == "lse":
        size = size.clamp_min(1.0)
    elif name == "dsinks":
        if "dsinks_rows_scale" in truth:
            size = torch.maximum(size, _over_rows(truth["dsinks_rows_scale"]))
        if "dsinks_rows" in truth and "dsinks_rows" in eager:
            distance = torch.maximum(distance, _over_rows(eager["dsinks_rows"].double() - truth["dsinks_rows"]))
    elif f"{name}_scale" in truth:
        size = torch.maximum(size, truth[f"{name}_scale"])
    # An eager result that overflowed is no measure of anything and gives no slack.
    return Expected(name, exact, size, torch.where(distance.isfinite(), distance, 0.0))


class Budget(NamedTuple):
    """Largest allowed relative error of an output as a whole and of its worst row."""

    rel: float
    row: float


class Outcome(NamedTuple):
    """Relative error, what it may be, whether it and every row are within the budget, and if not, what is wrong."""

    error: float
    allowed: float
    ok: bool
    message: str = ""


class Comparison(NamedTuple):
    """Relative error of an output as a whole and of its worst row, and that row's index."""

    rel: float
    row: float
    at: tuple[int, ...]


def error_budget(of: Expected, dtype: torch.dtype) -> Budget:
    """The rule's two limits for one output of a call with inputs of the half ``dtype``."""
    rounding, tiny = _rounding(of.name, dtype)
    eager, terms = (float(torch.linalg.vector_norm(x)) for x in (of.eager_distance, of.row_size))
    absolute = 2 * eager + rounding * terms + tiny * math.sqrt(of.truth.numel())
    worst = float(_row_errors(of, of.eager_distance, tiny).max()) if of.row_size.numel() else 0.0
    return Budget(rel=absolute / of.size if of.size else 0.0, row=10 * worst + rounding)


def compare(of: Expected, actual: torch.Tensor, dtype: torch.dtype) -> Comparison:
    """Errors of ``actual``, shaped like the truth."""
    distance = _row_norm(of.name, _difference(actual, of.truth))
    if not distance.numel():
        return Comparison(0.0, 0.0, ())
    errors = _row_errors(of, distance, _rounding(of.name, dtype)[1])
    row, worst = errors.flatten().max(dim=0)
    total, row_error, place = torch.stack([torch.linalg.vector_norm(distance), row, worst.double()]).tolist()
    rel = total / of.size if of.size else (math.inf if total else 0.0)
    at = torch.unravel_index(torch.tensor(int(place)), errors.shape)
    return Comparison(rel, row_error, tuple(int(i) for i in at))


def check(
    outputs: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
    eager: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, Outcome]:
    """Judge every output by the error rule; NaN or an infinity the truth has not is never right.

    Args:
        outputs: any of o, lse, dq, dk, dv, dsinks, in the truth's layouts.
        truth, eager: from :func:`truth_and_eager`.
        dtype: half dtype of the inputs.
    """
    outcomes = {}
    for name, x in outputs.items():
        if x.shape != truth[name].shape:
            message = f"{name}: expected shape {tuple(truth[name].shape)}, got {tuple(x.shape)}"
            outcomes[name] = Outcome(math.inf, 0.0, False, message)
            continue
        of = expected(name, truth, eager)
        budget, found = error_budget(of, dtype), compare(of, x, dtype)
        message = verdict_message(name, found, budget, f"index {found.at}")
        outcomes[name] = Outcome(found.rel, budget.rel, not message, message)
    return outcomes


def verdict_message(name: str, found: Comparison, budget: Budget, where: str) -> str:
    """What is wrong with an output whose worst row is at ``where``, "" if nothing is."""
    problems = []
    if not found.rel <= budget.rel:
        problems.append(f"error {found.rel:.3g} where twice eager's and one rounding allow {budget.rel:.3g}")
    if not found.row <= budget.row:
        problems.append(f"a row's error where ten times eager's worst and one rounding allow {budget.row:.3g}")
    return f"{name}: {'; '.join(problems)}; worst row at {where}, error {found.row:.3g}" if problems else ""


def _rounding(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute size of one rounding of the output."""
    if name == "lse":
        return LSE_ROUNDING, 0.0
    info = torch.finfo(dtype)
    return info.eps / 2, 0.0 if name == "dsinks" else info.smallest_normal * info.eps / 2


def _difference(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """x - truth in float64, infinite where x is NaN or where only one of the two is finite."""
    truth = truth.double()
    x = x.to(truth)
    return torch.where(x == truth, 0.0, x - truth).abs().nan_to_num(nan=math.inf, posinf=math.inf)


def _finite(truth: torch.Tensor) -> torch.Tensor:
    return torch.where(truth.isfinite(), truth, 0.0)


def _row_norm(name: str, x: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = x.abs() if name in ("lse", "dsinks") else torch.linalg.vector_norm(x, dim=-1)
    return norm


def _over_rows(x: torch.Tensor) -> torch.Tensor:
    """(heads,) root-sum-squares of something laid out like lse."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=1 if x.dim() == 2 else (0, 2))
    return norm


def _ratio(distance: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return torch.where(distance == 0, 0.0, distance / size)


def _row_errors(of: Expected, distance: torch.Tensor, tiny: float) -> torch.Tensor:
    """Relative errors of rows, beyond the roundings to a subnormal; a row without terms has none of those."""
    width = 1 if of.name in ("lse", "dsinks") else of.truth.shape[-1]
    beyond = (distance - tiny * math.sqrt(width)).clamp_min(0.0)
    return _ratio(torch.where(of.row_size > 0, beyond, distance), of.row_size)
