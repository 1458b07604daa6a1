"""TileLang's own example of attention with sinks, from the user's copy of example_gqa_sink_bwd_bhsd.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import (
    RETAINED_GRAPH,
    Peer,
    configured_path,
    hash_files,
    load_file,
    prepare_autograd,
    visible_window,
)
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared

_FILE = "examples/attention_sink/example_gqa_sink_bwd_bhsd.py of github.com/tile-ai/tilelang"
_WINDOW_MULTIPLE = 64


class TileLang(Peer):
    name = "tilelang"
    distributions = ("tilelang",)
    known_options = ("path",)
    varlen = False
    fewer_queries = False
    unequal_head_dims = False
    no_sinks = False
    max_head_dim = 128

    def check_installed(self) -> None:
        import tilelang  # noqa: F401

        configured_path(self.name, self.options, _FILE)

    def unsupported(self, case: Case) -> str | None:
        if reason := super().unsupported(case):
            return reason
        window = visible_window(case)
        if window is not None and window % _WINDOW_MULTIPLE:
            return f"tilelang's example wants windows that are multiples of {_WINDOW_MULTIPLE}, got {window}"
        if case.head_dim % 32:
            return f"tilelang's example wants head dims that are multiples of 32, got {case.head_dim}"
        return None

    def versions(self) -> dict[str, str]:
        found = super().versions()
        try:
            found["tilelang_source"] = hash_files([configured_path(self.name, self.options, _FILE)])
        except OSError:
            pass
        return found

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        path = configured_path(self.name, self.options, _FILE)
        attention = load_file(f"_peer_tilelang_{hash_files([path])}", path).attention
        assert inputs.sinks is not None
        # its layout is (batch, heads, seqlen, head_dim), contiguous; its sinks have the dtype of q
        q, k, v, do = (t.transpose(1, 2).contiguous() for t in (inputs.q, inputs.k, inputs.v, inputs.do))
        transposed = dataclasses.replace(inputs, q=q, k=k, v=v, do=do, sinks=inputs.sinks.to(q.dtype))
        window, groups = visible_window(case), case.heads_q // case.heads_kv

        def call(q: Any, k: Any, v: Any, sinks: Any) -> tuple[Any, None]:
            return attention(q, k, v, sinks, window, groups), None

        notes = ["inputs made contiguous as (batch, heads, seqlen, head_dim) outside the timing",
                 f"sinks rounded to {case.dtype}, the only type it takes"]
        if case.pass_ != "fwd":
            notes.append(RETAINED_GRAPH)
        prepared = prepare_autograd(case, transposed, call, note="; ".join(notes), deterministic=False)
        outputs = prepared.outputs
        prepared.outputs = lambda: {n: t if n == "dsinks" else t.transpose(1, 2) for n, t in outputs().items()}
        return prepared


def make(options: Mapping[str, Any]) -> Implementation:
    return TileLang(options)
