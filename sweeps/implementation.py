"""What the suite asks of anything it can time: a kernel of ours, a peer, or a user's own.

An implementation is one small object. A user adds one by naming its dotted path (``package.module:NAME``) in the YAML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from sweeps.cases import Case


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of one case on one device.

    Fixed length: q, do (batch, seqlen_q, heads_q, D or Dv); k, v (batch, seqlen_k, heads_kv, D or Dv).
    Varlen: the first two dimensions are one, (total_tokens, heads, head_dim), and cu_seqlens is int32 (batch + 1,).
    sinks is float32 (heads_q,) or None. None of them requires grad.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    do: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    window: int | None
    softmax_scale: float


@dataclasses.dataclass
class Prepared:
    """A call that is ready to be timed.

    Attributes:
        run: performs the pass once, asynchronously on the current stream, without host synchronisation.
        outputs: after a run, its results by name (o, lse, dq, dk, dv, dsinks; a subset where the implementation has
            no such output), in the layouts of Inputs; lse is float32 (batch, heads_q, seqlen_q), varlen
            (heads_q, total).
        poison: fills every output buffer the call writes into with NaN; None where the callee allocates its own.
        note: what was done to make the comparison fair ("" = nothing special).
        applies_sink: whether the result contains the sink.
        deterministic: whether two runs give the same bits, None = unknown.
        resources: registers, spills, shared_bytes of the main kernel where known.
    """

    run: Callable[[], None]
    outputs: Callable[[], Mapping[str, torch.Tensor]]
    poison: Callable[[], None] | None = None
    note: str = ""
    applies_sink: bool = True
    deterministic: bool | None = None
    resources: dict[str, int] = dataclasses.field(default_factory=dict)


class Implementation(Protocol):
    """A kernel family or a peer.

    Cheap to construct: heavy imports happen in :meth:`prepare` and :meth:`unavailable`.
    """

    name: str                 # the impl column
    is_flash: bool            # counts for speedup_vs_flash when its result contains the sink

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all (package missing, no CUDA), or None."""
        ...

    def unsupported(self, case: Case) -> str | None:
        """Why it cannot do this case, or None. Needs no GPU and no import of the package."""
        ...

    def versions(self) -> dict[str, str]:
        """Package versions (or a source hash) that belong to the row's key."""
        ...

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        """Configurations worth trying on the case when the YAML lists none.

        ``[{}]`` for an implementation without tunables.
        """
        ...

    def rejected(self, case: Case, config: Mapping[str, Any], arch: int) -> str | None:
        """Why this configuration cannot work on this case on sm_``arch`` (90 for Hopper), or None. Needs no GPU."""
        ...

    def compile(self, case: Case, config: Mapping[str, Any], arch: int) -> dict[str, Any]:
        """Build the kernels of this configuration for sm_``arch`` without a GPU, filling the on-disk cache.

        Returns registers, spills, shared_bytes, binary (a hash of the machine code) and hgmma (tensor-core instruction
        count); {} where the implementation has nothing to build ahead. Raises what the compiler raises.
        """
        ...

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        """Allocate, run whatever must come before the pass (the forward of a backward), and return the timed call."""
        ...
