"""A case: one shape, one pass, one dtype. Everything measured belongs to exactly one case."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

PASSES = ("fwd", "bwd_dq", "bwd_dkdv", "bwd", "fwd_bwd")
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload. Lengths are in tokens.

    For a varlen case ``varlen`` is its name, ``seqlens`` the lengths of its sequences (keys and queries alike),
    ``batch`` their number and ``seqlen_q == seqlen_k == max(seqlens)``; otherwise ``varlen`` is "" and ``seqlens`` ().
    ``window`` counts the query's own key; None is causal only. ``model`` is a label and not part of the identity.
    """

    pass_: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    window: int | None = None
    varlen: str = ""
    seqlens: tuple[int, ...] = ()
    sinks: bool = True
    seed: int = 0
    model: str = dataclasses.field(default="", compare=False)

    def columns(self) -> dict[str, Any]:
        """The identifying columns of results.csv, under their contract names."""
        return {
            "pass": self.pass_, "dtype": self.dtype, "batch": self.batch, "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k, "heads_q": self.heads_q, "heads_kv": self.heads_kv, "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v, "window": self.window, "varlen": self.varlen, "seed": self.seed,
        }

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"seqlens": list(self.seqlens)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Case:
        return cls(**(fields | {"seqlens": tuple(fields.get("seqlens", ()))}))

    @property
    def id(self) -> str:
        """Readable and stable: ``fwd-bfloat16-b1-q8192-k8192-h64x8-d64x64-w128``.

        With ``-varlen.NAME.HASH``, ``-nosink`` and ``-sSEED`` where they apply.
        """
        parts = [self.pass_, self.dtype, f"b{self.batch}", f"q{self.seqlen_q}", f"k{self.seqlen_k}",
                 f"h{self.heads_q}x{self.heads_kv}", f"d{self.head_dim}x{self.head_dim_v}",
                 "causal" if self.window is None else f"w{self.window}"]
        if self.varlen:
            parts.append(f"varlen.{self.varlen}.{hashlib.sha256(json.dumps(self.seqlens).encode()).hexdigest()[:6]}")
        if not self.sinks:
            parts.append("nosink")
        if self.seed:
            parts.append(f"s{self.seed}")
        return "-".join(parts)

    @property
    def shape_id(self) -> str:
        """The id without the pass: what forward and backward of one workload share."""
        return self.id.split("-", 1)[1]

    def with_pass(self, pass_: str) -> Case:
        return dataclasses.replace(self, pass_=pass_)


def family(case: Case) -> tuple[Any, ...]:
    """What neighbouring shapes have in common: everything but lengths, batch, seed and the window's size."""
    return (case.dtype, case.heads_q, case.heads_kv, case.head_dim, case.head_dim_v, case.window is None,
            bool(case.varlen), case.sinks)
