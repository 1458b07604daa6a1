"""Eager PyTorch: the score matrix materialised, the sink an extra column of the softmax, all in the inputs' dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import RETAINED_GRAPH, Peer, prepare_autograd
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared


class Eager(Peer):
    name = "eager"
    needs_cuda = False

    def unsupported(self, case: Case) -> str | None:
        # rows without a visible key are fine here
        return super().unsupported(dataclasses.replace(case, seqlen_q=min(case.seqlen_q, case.seqlen_k)))

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        from flash_sink_attn.reference import eager_attention

        def attention(q: Any, k: Any, v: Any, sinks: Any) -> tuple[Any, None]:
            return eager_attention(q, k, v, sinks, window=inputs.window, softmax_scale=inputs.softmax_scale,
                                   cu_seqlens_q=inputs.cu_seqlens), None

        return prepare_autograd(case, inputs, attention, note=RETAINED_GRAPH if case.pass_ == "bwd" else "")


def make(options: Mapping[str, Any]) -> Implementation:
    return Eager(options)
