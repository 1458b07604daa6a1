"""FlashAttention-4 (package flash-attn-4, module flash_attn.cute), which has sinks of its own: ``learnable_sink=``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import RETAINED_GRAPH, Peer, prepare_autograd, visible_window
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared


class Fa4(Peer):
    name = "fa4"
    is_flash = True
    distributions = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")
    known_options = ("deterministic",)

    def check_installed(self) -> None:
        # read when the package is first imported: what it compiled in an earlier sweep need not be compiled again
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # noqa: F401

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        window = visible_window(case)
        deterministic = bool(self.options.get("deterministic", False))
        options: dict[str, Any] = {
            "softmax_scale": inputs.softmax_scale, "causal": True, "deterministic": deterministic, "return_lse": True,
            "window_size": (None, None) if window is None else (window - 1, 0),
        }
        function = flash_attn_func
        if inputs.cu_seqlens is not None:
            function = flash_attn_varlen_func
            options |= {"cu_seqlens_q": inputs.cu_seqlens, "cu_seqlens_k": inputs.cu_seqlens,
                        "max_seqlen_q": inputs.max_seqlen, "max_seqlen_k": inputs.max_seqlen}

        def attention(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            return function(q, k, v, learnable_sink=sinks, **options)[:2]

        return prepare_autograd(case, inputs, attention, deterministic=deterministic,
                                note=RETAINED_GRAPH if case.pass_ == "bwd" else "")


def make(options: Mapping[str, Any]) -> Implementation:
    return Fa4(options)
