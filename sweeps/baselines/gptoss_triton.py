"""OpenAI's Triton kernel of gpt-oss, forward only, from the user's copy of gpt_oss/triton/attention.py."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from sweeps.baselines.common import Peer, configured_path, hash_files, load_file, visible_window
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared

_BLOCK = 64
_FILE = "gpt_oss/triton/attention.py of github.com/openai/gpt-oss"


class _Anything(ModuleType):
    """Stands in for pytest, which the file imports for its own tests: every attribute decorates and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return lambda function: function


class GptOssTriton(Peer):
    name = "gptoss_triton"
    known_options = ("path",)
    passes = ("fwd",)
    varlen = False
    fewer_queries = False  # with a start position it skips the keys before it
    unequal_head_dims = False
    no_sinks = False

    def check_installed(self) -> None:
        self._load()

    def _load(self) -> ModuleType:
        path = configured_path(self.name, self.options, _FILE)
        return load_file(f"_peer_gptoss_{hash_files([path])}", path, stand_ins={"pytest": _Anything("pytest")})

    def unsupported(self, case: Case) -> str | None:
        if reason := super().unsupported(case):
            return reason
        if case.head_dim not in (64, 128, 256):
            return f"gptoss_triton supports head dims 64, 128 and 256, got {case.head_dim}"
        return None

    def versions(self) -> dict[str, str]:
        try:
            return {"gptoss_source": hash_files([configured_path(self.name, self.options, _FILE)])}
        except OSError:
            return {}

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        import torch
        import torch.nn.functional as F
        from triton.tools.tensor_descriptor import TensorDescriptor

        kernel = self._load()._attn_fwd
        groups = case.heads_q // case.heads_kv
        padding = -case.seqlen_q % _BLOCK

        def rows_padded(x: torch.Tensor, repeats: int) -> torch.Tensor:
            x = x.transpose(1, 2).repeat_interleave(repeats, dim=1)
            return F.pad(x, (0, 0, 0, padding)).contiguous()

        q, k, v = rows_padded(inputs.q, 1), rows_padded(inputs.k, groups), rows_padded(inputs.v, groups)
        o = torch.empty_like(q)
        m = q.new_empty(q.shape[:3], dtype=torch.float32)
        start_q = torch.zeros(1, dtype=torch.int32, device=q.device)
        tile = [1, 1, _BLOCK, case.head_dim]
        q_tiles, k_tiles, v_tiles, o_tiles = (TensorDescriptor.from_tensor(t, tile) for t in (q, k, v, o))
        grid = (q.shape[2] // _BLOCK, case.batch * case.heads_q, 1)

        def run() -> None:
            kernel[grid](
                q_tiles, k_tiles, v_tiles, inputs.sinks, inputs.softmax_scale, m, o_tiles, start_q,
                q.shape[0], q.shape[1],
                N_Q_CTX=q.shape[2], N_KV_CTX=case.seqlen_k, HEAD_DIM=case.head_dim, BANDWIDTH=visible_window(case),
                BLOCK_M=_BLOCK, BLOCK_N=_BLOCK)

        def poison() -> None:
            o.fill_(float("nan"))

        run()
        return Prepared(
            run=run, outputs=lambda: {"o": o[:, :, :case.seqlen_q].transpose(1, 2)}, poison=poison, deterministic=True,
            note="the kernel alone: its wrapper's transposes, padding and repetition of the key heads are done outside "
                 "the timing; its lse leaves out the sink and is not compared")


def make(options: Mapping[str, Any]) -> Implementation:
    return GptOssTriton(options)
