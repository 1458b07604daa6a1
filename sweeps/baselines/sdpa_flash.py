"""FlashAttention-2 as built into PyTorch, the kernel of SDPA's flash backend.

SDPA itself returns no lse and has no windows, so the kernel is called through the operators SDPA and
``torch.nn.attention.varlen`` call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import Peer, Unsupported, prepare_with_sink_on_top, visible_window
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared


class SdpaFlash(Peer):
    name = "sdpa_flash"
    is_flash = True
    needs_cuda = False
    unequal_head_dims = False

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        if inputs.q.device.type == "cuda":
            return self._on_cuda(case, inputs)
        return self._on_cpu(case, inputs)

    def _on_cuda(self, case: Case, inputs: Inputs) -> Prepared:
        import torch

        q, k, v, do, cu = inputs.q, inputs.k, inputs.v, inputs.do, inputs.cu_seqlens
        longest_q, longest_k = (q.shape[1], k.shape[1]) if cu is None else (inputs.max_seqlen, inputs.max_seqlen)
        window = visible_window(case)
        masked: dict[str, Any] = {"scale": inputs.softmax_scale}
        if window is not None:
            masked |= {"window_size_left": window - 1, "window_size_right": 0}
        causal = window is None  # a window with nothing to the right is causal already

        def forward() -> tuple[Any, Any, Any]:
            o, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, cu, cu, longest_q, longest_k, 0.0, causal, False, **masked)
            return o, lse, (seed, offset)

        def backward(o: Any, lse: Any, random: Any) -> Any:
            return torch.ops.aten._flash_attention_backward(
                do, q, k, v, o, lse, cu, cu, longest_q, longest_k, 0.0, causal, *random, **masked)

        return prepare_with_sink_on_top(case, inputs, forward, backward, deterministic=False,
                                        note="SDPA's flash kernel through aten::_flash_attention_forward")

    def _on_cpu(self, case: Case, inputs: Inputs) -> Prepared:
        import torch

        if visible_window(case) is not None or case.varlen or case.seqlen_q != case.seqlen_k:
            raise Unsupported("PyTorch's flash kernel for CPUs has no windows, varlen batches or unequal lengths")
        q, k, v, do = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v, inputs.do))
        groups = case.heads_q // case.heads_kv
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

        def forward() -> tuple[Any, Any, Any]:
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, True, scale=inputs.softmax_scale)
            return o.transpose(1, 2), lse, None

        def backward(o: Any, lse: Any, _: Any) -> Any:
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o.transpose(1, 2), lse, 0.0, True, scale=inputs.softmax_scale)
            dk, dv = (g.unflatten(1, (case.heads_kv, groups)).sum(2) for g in (dk, dv))
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

        return prepare_with_sink_on_top(case, inputs, forward, backward,
                                        note="PyTorch's flash kernel for CPUs, key heads repeated")


def make(options: Mapping[str, Any]) -> Implementation:
    return SdpaFlash(options)
