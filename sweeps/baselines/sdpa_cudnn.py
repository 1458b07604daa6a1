"""cuDNN attention as built into PyTorch, through the operator of SDPA's cuDNN backend, since SDPA returns no lse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import Peer, prepare_with_sink_on_top
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared


class SdpaCudnn(Peer):
    name = "sdpa_cudnn"
    is_flash = True
    distributions = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    windows = False
    varlen = False
    fewer_queries = False  # its causal mask is aligned top-left
    max_head_dim = 128

    def check_installed(self) -> None:
        import torch

        if not torch.backends.cudnn.is_available():
            raise RuntimeError("this PyTorch has no cuDNN")

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        import torch

        q, k, v, do = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v, inputs.do))
        scale = inputs.softmax_scale

        def forward() -> tuple[Any, Any, Any]:
            o, lse, cu_q, cu_k, longest_q, longest_k, seed, offset, _ = (
                torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale))
            rest = (seed, offset, None, cu_q, cu_k, longest_q, longest_k), lse.shape  # lse may end in a dimension of 1
            return o.transpose(1, 2), lse.reshape(q.shape[:3]), rest

        def backward(o: Any, lse: Any, rest: Any) -> Any:
            arguments, shape = rest
            gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                do, q, k, v, o.transpose(1, 2), lse.reshape(shape), *arguments, 0.0, True, scale=scale)
            return tuple(g.transpose(1, 2) for g in gradients)

        return prepare_with_sink_on_top(
            case, inputs, forward, backward,
            note="SDPA's cuDNN kernel through aten::_scaled_dot_product_cudnn_attention")


def make(options: Mapping[str, Any]) -> Implementation:
    return SdpaCudnn(options)
