"""Attention and its gradients by explicit formulas for one key head of one sequence, a chunk of query rows at a time.

One loop, two arithmetics: float64, and half precision rounded where eager PyTorch rounds. Memory is bounded by the
chunk, work by the band that the window leaves, and both can be restricted to some query rows or some keys.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

CELLS_PER_CHUNK = 1 << 25
WINDOW_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Query rows of a group and the keys they see: q (G, R, D), k (K, D), v (K, Dv), sinks (G,), visible (R, K)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor
    visible: torch.Tensor
    scale: float


@dataclasses.dataclass(frozen=True)
class Attended:
    """What a forward leaves of a chunk: p (G, R, K), the sink's share (G, R), o (G, R, Dv), lse (G, R)."""

    p: torch.Tensor
    p_sink: torch.Tensor
    o: torch.Tensor
    lse: torch.Tensor


@dataclasses.dataclass(frozen=True)
class ScoreGradient:
    """Gradient of q k^T, ds (G, R, K or columns), and each row's share of the sink's, of_sink (G, R).

    Where measured, the squares of the size of the terms that each is the sum of. delta = dot(o, do) counts by its Dv
    products, for o is rounded and delta may be small by cancellation.
    """

    ds: torch.Tensor
    of_sink: torch.Tensor
    ds_squares: torch.Tensor | None = None
    of_sink_squares: torch.Tensor | None = None


class Arithmetic(Protocol):
    """How the steps of a chunk are computed."""

    dtype: torch.dtype          # of q, k, v, do, o, dq, dk, dv
    stat_dtype: torch.dtype     # of lse and sink terms
    measures_scale: bool        # whether the size of every row before cancellation is computed too

    def forward(self, chunk: Chunk) -> Attended:
        ...

    def score_gradient(
        self, chunk: Chunk, found: Attended, do: torch.Tensor, dlse: torch.Tensor | None, columns: torch.Tensor | None
    ) -> ScoreGradient:
        ...

    def key_sum(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """weights^T rows, (1 or G, K, D), in a dtype that chunks can be added up in."""
        ...

    def finish_key_sum(self, total: torch.Tensor) -> torch.Tensor:
        """(1 or G, K, D) sums over all rows -> (1, K, D) in ``dtype``."""
        ...

    def sum_rows(self, terms: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
        """Sink gradient from its rows' terms."""
        ...


class ExactArithmetic:
    """float64 throughout."""

    dtype = stat_dtype = torch.float64
    measures_scale = True

    def forward(self, chunk: Chunk) -> Attended:
        p = torch.matmul(chunk.q * chunk.scale, chunk.k.T).masked_fill_(~chunk.visible, float("-inf"))
        peak = torch.maximum(p.amax(dim=-1), chunk.sinks[:, None])
        p.sub_(peak[..., None]).exp_()
        p_sink = torch.exp(chunk.sinks[:, None] - peak)
        total = p.sum(dim=-1) + p_sink
        p.div_(total[..., None])
        return Attended(p, p_sink / total, torch.matmul(p, chunk.v), peak + total.log())

    def score_gradient(
        self, chunk: Chunk, found: Attended, do: torch.Tensor, dlse: torch.Tensor | None, columns: torch.Tensor | None
    ) -> ScoreGradient:
        products = found.o * do
        delta = products.sum(dim=-1)
        if dlse is not None:
            delta = delta - dlse
        delta_squares = delta * delta + (products * products).sum(dim=-1)
        p, v = (found.p, chunk.v) if columns is None else (found.p[..., columns], chunk.v[columns])
        dp = torch.matmul(do, v.T)
        squares = (dp * dp).add_(delta_squares[..., None]).mul_(p).mul_(p).mul_(chunk.scale**2)
        ds = dp.sub_(delta[..., None]).mul_(p).mul_(chunk.scale)
        return ScoreGradient(ds, -found.p_sink * delta, squares, found.p_sink * found.p_sink * delta_squares)

    def key_sum(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.matmul(weights.flatten(0, 1).T, rows.flatten(0, 1))[None]

    def finish_key_sum(self, total: torch.Tensor) -> torch.Tensor:
        return total

    def sum_rows(self, terms: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
        return terms.sum(dim=dim)


class EagerArithmetic:
    """Half precision as in autograd of ``eager_attention``: matmuls accumulate in float32, every result is rounded."""

    stat_dtype = torch.float32
    measures_scale = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def _logits(self, chunk: Chunk) -> torch.Tensor:
        """(G, R, K + 1), the sink last."""
        scores = (torch.matmul(chunk.q, chunk.k.T) * chunk.scale).masked_fill_(~chunk.visible, float("-inf"))
        column = chunk.sinks.to(self.dtype)[:, None, None].expand(-1, chunk.q.shape[1], 1)
        return torch.cat([scores, column], dim=-1)

    def forward(self, chunk: Chunk) -> Attended:
        logits = self._logits(chunk)
        probs = torch.softmax(logits, dim=-1)
        p = probs[..., :-1]
        return Attended(p, probs[..., -1], torch.matmul(p, chunk.v), torch.logsumexp(logits.float(), dim=-1))

    def score_gradient(
        self, chunk: Chunk, found: Attended, do: torch.Tensor, dlse: torch.Tensor | None, columns: torch.Tensor | None
    ) -> ScoreGradient:
        # The softmax's backward reduces and multiplies in float32 and rounds its result once.
        p, dp = found.p, torch.matmul(do, chunk.v.T).float()
        total = (dp * p).sum(dim=-1)
        of_sink = (-found.p_sink * total).to(self.dtype)
        if columns is not None:
            dp, p = dp[..., columns], p[..., columns]
        ds = dp.sub_(total[..., None]).mul_(p).to(self.dtype)
        if dlse is not None:
            of_lse = torch.exp(self._logits(chunk).float() - found.lse[..., None]).mul_(dlse[..., None]).to(self.dtype)
            of_sink = of_sink + of_lse[..., -1]
            ds = ds + (of_lse[..., :-1] if columns is None else of_lse[..., columns])
        return ScoreGradient(ds * chunk.scale, of_sink.float())

    def key_sum(self, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.matmul(weights.float().transpose(1, 2), rows.float())

    def finish_key_sum(self, total: torch.Tensor) -> torch.Tensor:
        # One matmul per query head, rounded, then the backward of repeat_interleave adds the heads.
        return total.to(self.dtype).float().sum(dim=0, keepdim=True).to(self.dtype)

    def sum_rows(self, terms: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
        return terms.sum(dim=dim).to(self.dtype).float()


def attend_group(
    arithmetic: Arithmetic,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    do: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    *,
    window: int | None,
    scale: float,
    rows: torch.Tensor | None = None,
    keys: torch.Tensor | None = None,
    row_chunk: int | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs, and with ``do`` gradients, of the query heads that share one key head, in one sequence.

    Args:
        q, do: (G, Sq, D or Dv). k, v: (Sk, D or Dv). sinks: (G,) or None. dlse: (G, Sq) or None.
        rows: CPU int64, ascending: compute o, lse and dq of these query rows only, and neither dk nor dv.
        keys: CPU int64, ascending: compute dk and dv of these keys only, and no dq. Excludes ``rows``.
        row_chunk: query rows at a time; default by memory.

    Returns:
        o (G, R, Dv), lse (G, R); with ``do`` dsinks_rows (G, R), zero without sinks, and dq (G, R, D), dk (1, K, D),
        dv (1, K, Dv) as selected; where the arithmetic measures it, the scale of each row of all but lse.
    """
    (group, seqlen_q, head_dim), seqlen_k, device = q.shape, k.shape[0], q.device
    no_sink = torch.full((group,), float("-inf"), device=device)
    sinks = (no_sink if sinks is None else sinks).to(arithmetic.dtype).to(arithmetic.stat_dtype)
    k, v = k.to(arithmetic.dtype), v.to(arithmetic.dtype)
    v_squares, k_squares = (v * v).sum(dim=-1), (k * k).sum(dim=-1)
    n_rows = seqlen_q if rows is None else len(rows)
    n_keys = seqlen_k if keys is None else len(keys)
    want_dq, want_dkdv = do is not None and keys is None, do is not None and rows is None

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=arithmetic.dtype, device=device)

    result = {"o": zeros(group, n_rows, v.shape[-1]), "lse": sinks[:, None].repeat(1, n_rows)}
    if do is not None:
        # A row that sees no key hands its lse's gradient on to the sink, which it equals.
        result["dsinks_rows"] = torch.zeros(group, n_rows, dtype=arithmetic.stat_dtype, device=device)
        if dlse is not None:
            chosen = dlse if rows is None else dlse[:, rows.to(device)]
            result["dsinks_rows"] += torch.where(sinks[:, None] == float("-inf"), 0, chosen)
    if want_dq:
        result["dq"] = zeros(group, n_rows, head_dim)
    dk_sum: torch.Tensor | None = None
    dv_sum: torch.Tensor | None = None
    scales: dict[str, torch.Tensor] = {}
    if arithmetic.measures_scale:
        scales["o"] = zeros(group, n_rows)
        if do is not None:
            scales["dsinks_rows"] = result["dsinks_rows"] ** 2
        if want_dq:
            scales["dq"] = zeros(group, n_rows)
        if want_dkdv:
            scales["dk"], scales["dv"] = zeros(1, n_keys), zeros(1, n_keys)

    offset = seqlen_k - seqlen_q
    first = max(0, -offset) if rows is None else int(torch.searchsorted(rows, max(0, -offset)))
    # Chosen rows may lie far apart, and then their chunk spans all keys.
    chunk = row_chunk or _row_chunk(group, seqlen_k, window if rows is None else None)
    for a in range(first, n_rows, chunk):
        b = min(a + chunk, n_rows)
        index = torch.arange(a, b) if rows is None else rows[a:b]
        lo = 0 if window is None else max(0, int(index[0]) + offset - window + 1)
        hi = int(index[-1]) + offset + 1
        at: slice | torch.Tensor = slice(a, b) if rows is None else index.to(device)
        distance = (index.to(device) + offset)[:, None] - torch.arange(lo, hi, device=device)
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        q_rows = q[:, at].to(arithmetic.dtype)
        part = Chunk(q_rows, k[lo:hi], v[lo:hi], sinks, visible, scale)
        found = arithmetic.forward(part)
        result["o"][:, a:b], result["lse"][:, a:b] = found.o, found.lse
        if scales:
            scales["o"][:, a:b] = torch.matmul(found.p * found.p, v_squares[lo:hi])
        if do is None:
            continue

        left, right, columns = lo, hi, None
        if keys is not None:
            left, right = (int(torch.searchsorted(keys, bound)) for bound in (lo, hi))
            columns = (keys[left:right] - lo).to(device)
        do_rows = do[:, at].to(arithmetic.dtype)
        dlse_rows = None if dlse is None else dlse[:, at].to(arithmetic.stat_dtype)
        gradient = arithmetic.score_gradient(part, found, do_rows, dlse_rows, columns)
        result["dsinks_rows"][:, a:b] = gradient.of_sink
        if gradient.of_sink_squares is not None:
            scales["dsinks_rows"][:, a:b] = gradient.of_sink_squares
        if want_dq:
            result["dq"][:, a:b] = torch.matmul(gradient.ds, k[lo:hi])
            if gradient.ds_squares is not None:
                scales["dq"][:, a:b] = torch.matmul(gradient.ds_squares, k_squares[lo:hi])
        if want_dkdv and right > left:
            p = found.p if columns is None else found.p[..., columns]
            dk_part, dv_part = arithmetic.key_sum(gradient.ds, q_rows), arithmetic.key_sum(p, do_rows)
            if dk_sum is None or dv_sum is None:
                dk_sum = dk_part.new_zeros(dk_part.shape[0], n_keys, head_dim)
                dv_sum = dv_part.new_zeros(dv_part.shape[0], n_keys, v.shape[-1])
            dk_sum[:, left:right] += dk_part
            dv_sum[:, left:right] += dv_part
            if gradient.ds_squares is not None:
                q_squares, do_squares = ((x * x).sum(dim=-1).flatten() for x in (q_rows, do_rows))
                scales["dk"][0, left:right] += torch.matmul(q_squares, gradient.ds_squares.flatten(0, 1))
                scales["dv"][0, left:right] += torch.matmul(do_squares, (p * p).flatten(0, 1))

    if want_dkdv:
        result["dk"] = zeros(1, n_keys, head_dim) if dk_sum is None else arithmetic.finish_key_sum(dk_sum)
        result["dv"] = zeros(1, n_keys, v.shape[-1]) if dv_sum is None else arithmetic.finish_key_sum(dv_sum)
    return result | {f"{name}_scale": squares.sqrt_() for name, squares in scales.items()}


def _row_chunk(group: int, seqlen_k: int, window: int | None) -> int:
    """Rows that keep a chunk within memory, and with a window its band narrow."""
    if window is None:
        return max(1, CELLS_PER_CHUNK // (group * max(1, seqlen_k)))
    rows = max(WINDOW_CHUNK, window)
    return max(1, min(rows, CELLS_PER_CHUNK // (group * min(rows + window, max(1, seqlen_k)))))
