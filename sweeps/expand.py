"""SweepSpec -> the cases of each group."""

from __future__ import annotations

from collections.abc import Iterator

from sweeps.cases import Case
from sweeps.presets import MODELS, VarlenBatch
from sweeps.spec import Shapes

Windows = tuple[int | None, ...]
Workload = tuple[int | None, int, tuple[int, int], VarlenBatch | None]


def expand(shapes: Shapes, seed: int) -> list[Case]:
    """Every workload of a grid once, as its forward; of two models with the same shape the first names it.

    Order: model or heads, dtype, sinks, window, then lengths, so that what differs only in length stands together.
    """
    cases: dict[Case, None] = {}
    for model, heads, dims, windows in _attentions(shapes):
        for dtype in shapes.dtype or ("bfloat16",):
            for sinks in shapes.sinks or (True,):
                for window, batch, seqlens, varlen in _workloads(shapes, windows):
                    cases.setdefault(Case(
                        pass_="fwd", dtype=dtype, batch=batch, seqlen_q=seqlens[0], seqlen_k=seqlens[1],
                        heads_q=heads[0], heads_kv=heads[1], head_dim=dims[0], head_dim_v=dims[1], window=window,
                        varlen=varlen.name if varlen else "", seqlens=varlen.seqlens if varlen else (), sinks=sinks,
                        seed=seed, model=model))
    return list(cases)


def _attentions(shapes: Shapes) -> Iterator[tuple[str, tuple[int, int], tuple[int, int], Windows]]:
    """Label, (query heads, key heads), (head dim, value head dim), windows of the model."""
    for name in shapes.model or ():
        model = MODELS[name]
        yield name, (model.heads_q, model.heads_kv), (model.head_dim, model.head_dim_v), model.windows
    for heads in shapes.heads or ():
        for dims in shapes.head_dim or ():
            yield "", heads, dims, (None,)


def _workloads(shapes: Shapes, windows: Windows) -> Iterator[Workload]:
    """Window, batch, (queries, keys), and the varlen batch they come from."""
    for window in shapes.window or windows:
        for batch in shapes.batch or (1,):
            for seqlens in shapes.seqlen or ():
                yield window, batch, seqlens, None
    for varlen in shapes.varlen or ():
        longest = max(varlen.seqlens)
        for window in shapes.window or varlen.windows or windows:
            yield window, len(varlen.seqlens), (longest, longest), varlen
