"""Cases, inputs and float64 truth for the peers' tests."""

from __future__ import annotations

import itertools
import math

import torch

from flash_sink_attn.reference import attention_reference_gradients
from sweeps.baselines.common import Peer
from sweeps.cases import Case
from sweeps.columns import OUTPUTS
from sweeps.implementation import Inputs


def case_of(pass_: str = "fwd", **changes) -> Case:
    seqlens = changes.get("seqlens", ())
    fields = {"dtype": "bfloat16", "batch": len(seqlens) or 2, "seqlen_q": max(seqlens, default=40),
              "seqlen_k": max(seqlens, default=40), "heads_q": 4, "heads_kv": 2, "head_dim": 16, "head_dim_v": 16,
              "window": None, "varlen": "some" if seqlens else ""}
    return Case(pass_, **(fields | changes))


def inputs_of(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    """In float64, so that a peer's formulas and not its rounding are tested."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, heads: int, dim: int) -> torch.Tensor:
        shape = (sum(case.seqlens), heads, dim) if case.varlen else (case.batch, rows, heads, dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # exact in bfloat16, which is all FlashAttention-3 takes
    sinks = torch.tensor([-2.0, 0.5, 3.0, -math.inf]).float() if case.sinks else None
    cu = torch.tensor([0, *itertools.accumulate(case.seqlens)], dtype=torch.int32) if case.varlen else None
    return Inputs(
        q=draw(case.seqlen_q, case.heads_q, case.head_dim), k=draw(case.seqlen_k, case.heads_kv, case.head_dim),
        v=draw(case.seqlen_k, case.heads_kv, case.head_dim_v), sinks=sinks,
        do=draw(case.seqlen_q, case.heads_q, case.head_dim_v), cu_seqlens=cu,
        max_seqlen=case.seqlen_q, window=case.window, softmax_scale=case.head_dim ** -0.5)


def truth_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    return attention_reference_gradients(inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.do, window=inputs.window,
                                         softmax_scale=inputs.softmax_scale, cu_seqlens_q=inputs.cu_seqlens)


def check(peer: Peer, case: Case, *, missing: tuple[str, ...] = (), rtol: float = 1e-7,
          dtype: torch.dtype = torch.float64):
    """Runs the peer twice and compares all the pass's outputs, layouts and all, with the truth."""
    assert peer.unsupported(case) is None
    inputs = inputs_of(case, dtype)
    prepared = peer.prepare(case, {}, inputs)
    if prepared.poison is None:
        assert prepared.outputs() == {}, "results of the preparation must not be left over"
    prepared.run()
    prepared.run()
    outputs, truth = prepared.outputs(), truth_of(inputs)
    expected = [n for n in OUTPUTS[case.pass_] if n not in missing and (n != "dsinks" or case.sinks)]
    assert list(outputs) == expected
    for name in expected:
        assert outputs[name].shape == truth[name].shape, name
        error = (outputs[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= rtol, (name, float(error))
    assert prepared.applies_sink
    return prepared


SHAPES = {
    "causal": {}, "window": {"window": 9}, "mha": {"heads_kv": 4}, "no sinks": {"sinks": False},
    "fewer queries": {"seqlen_q": 7, "window": 5}, "wide window": {"window": 40},
    "varlen": {"seqlens": (13, 0, 1, 26), "window": 6}, "unequal head dims": {"head_dim": 24},
}
