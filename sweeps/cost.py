"""What a case costs at the least: visible pairs, FLOPs, bytes, and the time below which no kernel can go.

FLOPs are the useful ones, one multiply-add being two. Work is credited, not counted: a kernel that recomputes scores
gets no credit for it, so that tflops of different algorithms for one pass compare as their times do.
"""

from __future__ import annotations

from collections.abc import Iterator

from sweeps.cases import Case
from sweeps.devices import Card

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2}
FLOAT32_BYTES = 4


def visible_pairs(seqlen_q: int, seqlen_k: int, window: int | None) -> int:
    """Visible (query, key) pairs of one head of one sequence: sum over i of clamp(i + 1 + Sk - Sq, 0, min(window, Sk)).

    Lengths and window are in tokens, window None = causal only. Closed form, exact for any length.
    """
    limit = seqlen_k if window is None else min(window, seqlen_k)
    # Row i sees first + i keys before clamping and the last row seqlen_k, so the rows' counts are a run of consecutive
    # integers: those below 1 add nothing, those up to limit add themselves, the rest add limit each.
    first = max(1 + seqlen_k - seqlen_q, 1)
    ramp = (first + limit) * (limit - first + 1) // 2 if limit >= first else 0
    return ramp + limit * (seqlen_k - max(limit, first - 1))


def _sequences(case: Case) -> Iterator[tuple[int, int]]:
    if case.varlen:
        yield from ((length, length) for length in case.seqlens)
    else:
        for _ in range(case.batch):
            yield case.seqlen_q, case.seqlen_k


def pairs(case: Case) -> int:
    """Visible pairs of one query head, summed over the batch."""
    return sum(visible_pairs(sq, sk, case.window) for sq, sk in _sequences(case))


def tokens(case: Case) -> tuple[int, int]:
    """Query tokens and key tokens of the whole batch."""
    return sum(sq for sq, _ in _sequences(case)), sum(sk for _, sk in _sequences(case))


def flops(case: Case) -> float:
    """Useful FLOPs of the case's pass.

    Per visible pair and query head, as multiples of 2 (D = query head dim, Dv = value head dim):

    ===========  ===========  ==============================================================================
    fwd          D + Dv       S = Q K^T, O = P V
    bwd          3 D + 2 Dv   S again, dP = dO V^T, dV = P^T dO, dQ = dS K, dK = dS^T Q
    bwd_dq       2 D + Dv     S, dP, dQ: what any kernel must do that makes dQ alone
    bwd_dkdv     2 D + 2 Dv   S, dP, dV, dK: what any kernel must do that makes dK and dV alone
    fwd_bwd      4 D + 3 Dv   fwd + bwd
    ===========  ===========  ==============================================================================

    A part's S and dP are credited to it, since without them it has no result; so the two parts add up to more than bwd,
    and the tflops of a split backward (bwd) is lower than that of either part: this is the price of splitting, shown.
    """
    d, dv = case.head_dim, case.head_dim_v
    per_pair = {"fwd": d + dv, "bwd": 3 * d + 2 * dv, "bwd_dq": 2 * d + dv, "bwd_dkdv": 2 * d + 2 * dv,
                "fwd_bwd": 4 * d + 3 * dv}
    return 2.0 * per_pair[case.pass_] * case.heads_q * pairs(case)


def compulsory_bytes(case: Case) -> float:
    """Bytes of the pass when every input is read once and every output written once.

    fwd reads q, k, v, sinks and writes o, lse. bwd reads q, k, v, sinks, o, lse, do and writes dq, dk, dv, dsinks. Its
    parts read q, k, v, do and lse, and delta where the other computes it: bwd_dq reads o and writes dq, dsinks and
    delta; bwd_dkdv reads delta and writes dk, dv. fwd_bwd is their sum. lse, delta and sinks are float32; dsinks too.
    """
    query_tokens, key_tokens = tokens(case)
    size = ELEMENT_BYTES[case.dtype]
    q = query_tokens * case.heads_q * case.head_dim * size
    o = query_tokens * case.heads_q * case.head_dim_v * size
    k = key_tokens * case.heads_kv * case.head_dim * size
    v = key_tokens * case.heads_kv * case.head_dim_v * size
    rows = query_tokens * case.heads_q * FLOAT32_BYTES
    sinks = case.heads_q * FLOAT32_BYTES if case.sinks else 0
    inputs = q + k + v
    total = {
        "fwd": inputs + sinks + o + rows,
        "bwd": inputs + sinks + 2 * o + rows + inputs + sinks,
        "bwd_dq": inputs + sinks + 2 * o + rows + q + sinks + rows,
        "bwd_dkdv": inputs + o + 2 * rows + k + v,
    }
    total["fwd_bwd"] = total["fwd"] + total["bwd"]
    return float(total[case.pass_])


def floor_ms(case: Case, card: Card) -> float:
    """The larger of the time to move the compulsory bytes and the time to do the useful FLOPs, milliseconds.

    At the card's measured copy and GEMM rates where known, else at its data sheet's.
    """
    return max(compulsory_bytes(case) / (card.ceiling_tb_per_s * 1e9), flops(case) / (card.ceiling_tflops * 1e9))
