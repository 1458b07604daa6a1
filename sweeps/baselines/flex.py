"""FlexAttention, compiled: a block mask for causality, window and document, the sink applied through its lse."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import (
    RETAINED_GRAPH,
    Peer,
    Unsupported,
    allow_recompiles,
    prepare_autograd,
    visible_window,
)
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared

_LARGE_MASK = 1 << 28  # elements; above it building the block mask eagerly would hold gigabytes


@functools.lru_cache(maxsize=2)
def block_mask(seqlen_q: int, seqlen_k: int, window: int | None, seqlens: tuple[int, ...], device: str) -> Any:
    """The BlockMask of a causal (windowed) mask aligned bottom-right, within each of ``seqlens`` where given."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    offset = seqlen_k - seqlen_q
    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i + offset >= j

    def windowed(b: Any, h: Any, i: Any, j: Any) -> Any:
        assert window is not None
        return (i + offset >= j) & (i + offset - j < window)

    within = causal if window is None else windowed
    mask = within
    if seqlens:
        document = torch.repeat_interleave(torch.arange(len(seqlens)), torch.tensor(seqlens)).to(device)

        def in_document(b: Any, h: Any, i: Any, j: Any) -> Any:
            return within(b, h, i, j) & (document[i] == document[j])

        mask = in_document
    create = torch.compile(create_block_mask) if seqlen_q * seqlen_k > _LARGE_MASK else create_block_mask
    return create(mask, None, None, seqlen_q, seqlen_k, device=device)


class Flex(Peer):
    name = "flex"
    needs_cuda = False

    def check_installed(self) -> None:
        import torch.nn.attention.flex_attention  # noqa: F401

    def unsupported(self, case: Case) -> str | None:
        if reason := super().unsupported(case):
            return reason
        if min(case.head_dim, case.head_dim_v) < 16:
            return f"flex does not support head dims below 16, got {case.head_dim}/{case.head_dim_v}"
        return None

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        import torch
        from torch.nn.attention import flex_attention as module

        varlen = inputs.cu_seqlens is not None
        seqlen_q, seqlen_k = (inputs.q.shape[0], inputs.k.shape[0]) if varlen else (case.seqlen_q, case.seqlen_k)
        mask = block_mask(seqlen_q, seqlen_k, visible_window(case), case.seqlens, str(inputs.q.device))
        options: dict[str, Any] = {"block_mask": mask, "scale": inputs.softmax_scale,
                                   "enable_gqa": case.heads_q != case.heads_kv}
        request = getattr(module, "AuxRequest", None)  # PyTorch 2.10; return_lse before
        options |= {"return_lse": True} if request is None else {"return_aux": request(lse=True)}
        flex_attention = module.flex_attention

        def attention(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            if varlen:
                q, k, v = q[None], k[None], v[None]
            out, lse = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
            lse = lse if request is None else lse.lse
            if sinks is not None:
                sink = sinks[None, :, None]
                out = (out * torch.sigmoid(lse - sink)[..., None]).to(out.dtype)
                lse = torch.logaddexp(lse, sink)
            out = out.transpose(1, 2)
            return (out[0], lse[0]) if varlen else (out, lse)

        function: Any = attention
        if inputs.q.device.type == "cuda":
            allow_recompiles()
            function = torch.compile(attention, dynamic=False, fullgraph=True)
        notes = ["block mask made outside the timing"]
        if case.sinks:
            notes.append("sink applied by o * sigmoid(lse - sink), counted, differentiated through lse")
        if case.pass_ == "bwd":
            notes.append(RETAINED_GRAPH)
        try:
            return prepare_autograd(case, inputs, function, note="; ".join(notes))
        except NotImplementedError as error:  # such as its backward on CPUs
            raise Unsupported(str(error)) from error


def make(options: Mapping[str, Any]) -> Implementation:
    return Flex(options)
