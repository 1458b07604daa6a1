"""What the kernels are held to: the maths of sink attention in plain PyTorch, on any device, without Triton.

    visible(i, j):  0 <= (i + Sk - Sq) - j < window         window counts the query's own key, None = causal only
    s[i, j] = scale * dot(q[i], k[j])
    lse[i]  = log(exp(sink[h]) + sum over visible j of exp(s[i, j]))
    o[i]    = sum over visible j of exp(s[i, j] - lse[i]) * v[j]

A row that sees no key (Sq > Sk) has o = 0 and lse = sink, minus infinity without one.

:func:`attention_reference` and :func:`attention_reference_gradients` are the truth, in float64;
:func:`eager_attention` and :func:`eager_gradients` are the yardstick, what eager PyTorch makes of it in half precision.
The first of each pair is differentiable and holds the whole score matrix, the second uses explicit formulas and holds
a few query rows of it at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from flash_sink_attn._reference_blocks import Arithmetic, EagerArithmetic, ExactArithmetic, attend_group

_BY_HEAD = ("lse", "dsinks_rows", "dsinks_rows_scale")      # laid out (..., heads, rows), all else (..., rows, heads)


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    window: int | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention with sinks, differentiable, holding the whole score matrix.

    Args:
        q: (batch, seqlen_q, heads_q, D), or (total_q, heads_q, D) with ``cu_seqlens_q``.
        k: (batch, seqlen_k, heads_kv, D), or (total_k, heads_kv, D); heads_kv divides heads_q.
        v: (batch, seqlen_k, heads_kv, Dv), or (total_k, heads_kv, Dv).
        sinks: (heads_q,) logits, minus infinity = no sink for that head; None = plain attention.
        window: keys a query sees, its own included; None = all before it.
        softmax_scale: default ``D ** -0.5``.
        cu_seqlens_q: (sequences + 1,) integer offsets of the sequences in q.
        cu_seqlens_k: the same for k and v; default ``cu_seqlens_q``.
        dtype: of all arithmetic.

    Returns:
        o in ``dtype``, shaped like q with Dv, and the natural-log lse with the sink in it, (batch, heads_q, seqlen_q)
        or (heads_q, total_q), in ``dtype`` but never below float32.

    Raises:
        ValueError: arguments that do not fit together.
    """
    _validate(q, k, v, sinks, window, cu_seqlens_q, cu_seqlens_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    sinks = None if sinks is None else sinks.to(dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, seqlen_q, heads_q, head_dim = q.shape
        seqlen_k, heads_kv = k.shape[1:3]
        grouped = q.reshape(batch, seqlen_q, heads_kv, heads_q // heads_kv, head_dim)
        scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k).flatten(1, 2) * scale
        scores = scores.masked_fill(~_visible(seqlen_q, seqlen_k, window, q.device), float("-inf"))
        logits = scores
        if sinks is not None:
            logits = torch.cat([scores, sinks[None, :, None, None].expand(batch, -1, seqlen_q, 1)], dim=-1)
        lse = torch.logsumexp(logits, dim=-1)
        p = torch.exp(scores - lse[..., None])
        p = p.reshape(batch, heads_kv, heads_q // heads_kv, seqlen_q, seqlen_k)
        o = torch.einsum("bhgij,bjhd->bihgd", p, v)
        return o.reshape(batch, seqlen_q, heads_q, -1), lse

    o, lse = _over_sequences(attend, q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
    return o, lse.to(torch.promote_types(dtype, torch.float32))


def eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    window: int | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What a model without a fused kernel runs, all in the dtype of q: what passes between two steps is rounded to it.

    Key heads are repeated, the score matrix is materialised, the sink is an extra column of it, then softmax and
    matmul. Differentiable. Arguments as for :func:`attention_reference`.

    Returns:
        o in the dtype of q; with ``return_lse`` also lse, float32: the half-precision logits, reduced in float32.
    """
    _validate(q, k, v, sinks, window, cu_seqlens_q, cu_seqlens_k)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    sinks = None if sinks is None else sinks.to(q.dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seqlen_q, seqlen_k, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
        k = k.transpose(1, 2).repeat_interleave(groups, dim=1)
        v = v.transpose(1, 2).repeat_interleave(groups, dim=1)
        logits = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) * scale
        logits = logits.masked_fill(~_visible(seqlen_q, seqlen_k, window, q.device), float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks[None, :, None, None].expand(q.shape[0], -1, seqlen_q, 1)], dim=-1)
        probs = torch.softmax(logits, dim=-1)
        o = torch.matmul(probs[..., :seqlen_k], v).transpose(1, 2)
        lse = torch.logsumexp(logits.float(), dim=-1) if return_lse else logits.new_empty(logits.shape[:-1])
        return o, lse

    o, lse = _over_sequences(attend, q, k, v, sinks, cu_seqlens_q, cu_seqlens_k)
    return (o, lse.float()) if return_lse else o


def attention_reference_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    do: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
    window: int | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    row_chunk: int | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs and gradients by explicit formulas in float64, a few query rows at a time.

        delta[i] = dot(o[i], do[i]) - dlse[i];  p = exp(s - lse);  ds = p * (do . v - delta)
        dq = scale * ds k;  dk = scale * ds^T q;  dv = p^T do
        dsinks[h] = - sum over b, i of exp(sink[h] - lse[i]) * delta[i]

    Args:
        do: gradient of o, shaped like it.
        dlse: gradient of lse, shaped like it; default 0.
        row_chunk: query rows held at a time; default by memory, about 1 GB.
        q, k, v, sinks, window, softmax_scale, cu_seqlens_q, cu_seqlens_k: as for :func:`attention_reference`.

    Returns:
        o, lse, dq, dk, dv and, with sinks, dsinks, in the layouts of the inputs; float64. Beside them, to judge errors
        by: o_scale, dq_scale, dk_scale, dv_scale, one number per row, the root of the sum of the squares of the terms
        whose sum the row is (its size had nothing cancelled), and with sinks dsinks_rows and dsinks_rows_scale, shaped
        like lse: what each row adds to dsinks.
    """
    return _gradients(
        ExactArithmetic(), q, k, v, sinks, do, dlse, window, softmax_scale, cu_seqlens_q, cu_seqlens_k, row_chunk)


def eager_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    do: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
    window: int | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    row_chunk: int | None = None,
) -> dict[str, torch.Tensor]:
    """What autograd makes of :func:`eager_attention`, rounding where it rounds, a few query rows at a time.

    Arguments as for :func:`attention_reference_gradients`.

    Returns:
        o, lse, dq, dk, dv and, with sinks, dsinks and dsinks_rows; o, dq, dk, dv in the dtype of q, the others float32.
    """
    arithmetic = EagerArithmetic(q.dtype)
    return _gradients(
        arithmetic, q, k, v, sinks, do, dlse, window, softmax_scale, cu_seqlens_q, cu_seqlens_k, row_chunk)


def _gradients(
    arithmetic: Arithmetic,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    window: int | None,
    softmax_scale: float | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    row_chunk: int | None,
) -> dict[str, torch.Tensor]:
    _validate(q, k, v, sinks, window, cu_seqlens_q, cu_seqlens_k)
    if do.shape != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(f"do: expected the shape of o, {(*q.shape[:-1], v.shape[-1])}, got {tuple(do.shape)}")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    groups = q.shape[-2] // k.shape[-2]
    per_sequence: list[dict[str, torch.Tensor]] = []
    for rows, keys, of_lse in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        per_head = []
        for g in range(k.shape[-2]):
            heads = slice(g * groups, (g + 1) * groups)
            per_head.append(attend_group(
                arithmetic, q[rows][:, heads].transpose(0, 1), k[keys][:, g], v[keys][:, g],
                None if sinks is None else sinks[heads], do[rows][:, heads].transpose(0, 1),
                None if dlse is None else dlse[of_lse][heads], window=window, scale=scale, row_chunk=row_chunk))
        # (heads, rows, ...) each; lse-like results keep that layout, the others are (rows, heads, ...)
        joined = {name: torch.cat([r[name] for r in per_head]) for name in per_head[0]}
        per_sequence.append({n: x if n in _BY_HEAD else x.transpose(0, 1) for n, x in joined.items()})
    varlen = cu_seqlens_q is not None
    results = {}
    for name in per_sequence[0]:
        parts = [r[name] for r in per_sequence]
        tokens_dim = 1 if name in _BY_HEAD else 0
        results[name] = torch.cat(parts, dim=tokens_dim) if varlen else torch.stack(parts)
    if sinks is None:
        results = {name: x for name, x in results.items() if not name.startswith("dsinks")}
    else:
        results["dsinks"] = arithmetic.sum_rows(results["dsinks_rows"], dim=1 if varlen else (0, 2))
    return results


def _sequences(
    q: torch.Tensor, k: torch.Tensor, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> Iterator[tuple[int | slice, int | slice, int | tuple[slice, slice]]]:
    """Indices of one sequence after another: into q and o, into k and v, into lse."""
    if cu_seqlens_q is None:
        for b in range(q.shape[0]):
            yield b, b, b
        return
    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        rows = slice(ends_q[b], ends_q[b + 1])
        yield rows, slice(ends_k[b], ends_k[b + 1]), (slice(None), rows)


def _over_sequences(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call ``attend`` on (batch, seqlen, heads, dim) with the rows that see a key, and add those that see none."""

    def with_blind_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, seqlen_q, heads_q, _ = q.shape
        blind = max(0, seqlen_q - k.shape[1])
        if blind == seqlen_q:
            o, lse = q.new_zeros(batch, 0, heads_q, v.shape[-1]), q.new_zeros(batch, heads_q, 0)
        else:
            o, lse = attend(q[:, blind:], k, v)
        if blind:
            above = lse.new_full((heads_q,), float("-inf"))
            if sinks is not None:
                # A head without a sink has no gradient for it either.
                above = torch.where(sinks == float("-inf"), above, sinks.to(lse.dtype))
            o = F.pad(o, (0, 0, 0, 0, blind, 0))
            lse = torch.cat([above[None, :, None].expand(batch, -1, blind), lse], dim=-1)
        return o, lse

    if cu_seqlens_q is None:
        return with_blind_rows(q, k, v)
    parts = [with_blind_rows(q[rows][None], k[keys][None], v[keys][None])
             for rows, keys, _ in _sequences(q, k, cu_seqlens_q, cu_seqlens_k)]
    return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)


def _visible(seqlen_q: int, seqlen_k: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(seqlen_q, seqlen_k) bool."""
    i = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[:, None]
    distance = i - torch.arange(seqlen_k, device=device)
    return (distance >= 0) & (distance < (seqlen_k + seqlen_q if window is None else window))


def _validate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    window: int | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
) -> None:
    rank = 4 if cu_seqlens_q is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(x.shape)}")
    if k.shape[:-1] != v.shape[:-1] or k.shape[-1] != q.shape[-1] or (rank == 4 and k.shape[0] != q.shape[0]):
        raise ValueError(f"k, v: shapes {tuple(k.shape)} and {tuple(v.shape)} do not fit q of shape {tuple(q.shape)}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[-2]}, got {k.shape[-2]}")
    if sinks is not None and sinks.shape != (q.shape[-2],):
        raise ValueError(f"sinks: expected shape ({q.shape[-2]},), got {tuple(sinks.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected None or at least 1, got {window}")
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k: expected None without cu_seqlens_q, got a tensor")
    if cu_seqlens_q is None:
        return
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens_q.dim() != 1 or len(cu_seqlens_q) < 2:
        raise ValueError(f"cu_seqlens_q: expected shape (sequences + 1,), got {tuple(cu_seqlens_q.shape)}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(f"cu_seqlens_k: expected {len(cu_seqlens_q)} offsets, got shape {tuple(cu_seqlens_k.shape)}")
    for name, x, ends in (("q", q, cu_seqlens_q), ("k", k, cu_seqlens_k)):
        if int(ends[-1]) != x.shape[0]:
            raise ValueError(f"{name}: expected {int(ends[-1])} tokens, the last of its offsets, got {x.shape[0]}")
