"""FlashAttention-3. Builds with a ``sinks`` argument apply the sink in the forward; no backward knows one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import Peer, prepare_flash, prepare_passes, visible_window
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared


def build_flags() -> dict[str, bool]:
    """The build flags in the package's own configuration module; {} where there is none."""
    try:
        from flash_attn_config import CONFIG  # pure Python, no kernels loaded

        return dict(CONFIG["build_flags"])
    except Exception:  # noqa: BLE001  # absent, or a layout not known here: then nothing is ruled out
        return {}


class Fa3(Peer):
    name = "fa3"
    is_flash = True
    distributions = ("flash-attn-3", "tokenspeed-fa3")
    known_options = ("deterministic",)

    def check_installed(self) -> None:
        from flash_sink_attn.flash_attn_with_sink import FlashAttention3

        FlashAttention3()

    def unsupported(self, case: Case) -> str | None:
        if reason := super().unsupported(case):
            return reason
        flags = build_flags()
        if case.pass_ != "fwd" and flags.get("FLASHATTENTION_DISABLE_BACKWARD"):
            return "this build of FlashAttention-3 has no backward"
        if case.head_dim != case.head_dim_v and flags.get("FLASH_ATTENTION_DISABLE_HDIMDIFF192"):
            return "this build of FlashAttention-3 has no unequal head dims"
        if case.varlen and flags.get("FLASHATTENTION_DISABLE_VARLEN"):
            return "this build of FlashAttention-3 has no varlen"
        if visible_window(case) is not None and flags.get("FLASHATTENTION_DISABLE_LOCAL"):
            return "this build of FlashAttention-3 has no windows"
        return None

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        from flash_sink_attn.flash_attn_with_sink import FlashAttention3

        flash = FlashAttention3()
        note = ""
        if case.pass_ == "fwd" and inputs.sinks is not None:
            if "sinks" in inspect.signature(flash.interface.flash_attn_func).parameters:
                sinks = inputs.sinks.bfloat16()  # the type these builds insist on
                if bool((sinks.float() == inputs.sinks.float()).all()):
                    return self._with_own_sinks(flash.interface, case, inputs, sinks.contiguous())
                note = "sinks= not used: it takes bfloat16 only, which these sinks are not exactly"
            else:
                note = "this build has no sinks="
        return prepare_flash(flash, case, inputs, bool(self.options.get("deterministic", False)), note)

    def _with_own_sinks(self, interface: Any, case: Case, inputs: Inputs, sinks: Any) -> Prepared:
        import torch

        window = visible_window(case)
        options: dict[str, Any] = {"softmax_scale": inputs.softmax_scale, "causal": True, "sinks": sinks,
                                   "window_size": (-1, -1) if window is None else (window - 1, 0)}
        function = interface.flash_attn_func
        if inputs.cu_seqlens is not None:
            function = interface.flash_attn_varlen_func
            options |= {"cu_seqlens_q": inputs.cu_seqlens, "cu_seqlens_k": inputs.cu_seqlens,
                        "max_seqlen_q": inputs.max_seqlen, "max_seqlen_k": inputs.max_seqlen}

        @torch.no_grad()
        def forward() -> dict[str, Any]:
            result = function(inputs.q, inputs.k, inputs.v, **options)
            return {"o": result[0] if isinstance(result, tuple) else result}

        return prepare_passes(case, forward, None,
                              note="sinks= in bfloat16, exact for these sinks; lse is computed but not compared")


def make(options: Mapping[str, Any]) -> Implementation:
    return Fa3(options)
