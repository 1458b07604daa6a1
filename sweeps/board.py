"""A run as a board: ours against the fastest peer, a ratio per case, their mean and the worst of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flash_sink_attn.config import IMPLS, HopperBwdConfig
from sweeps.columns import WHOLE_PASSES
from sweeps.measured import Measured
from sweeps.select import CaseResult, Selection
from sweeps.tables import (
    DTYPE_SHORT,
    NO_SINK,
    NONE,
    geometric_mean,
    length_label,
    markdown,
    mask_label,
    model_label,
    number,
    sort_key,
    time_cells,
    timed_impls,
    times,
    with_impl,
)


@dataclasses.dataclass(frozen=True)
class Board:
    """The cases of one pass in which a peer was timed, ratios being the fastest peer's time over ours.

    Attributes:
        ratios: of every case that has both; infinity is not among them.
        unmatched: cases in which no peer that applies the sink was ok.
    """

    pass_: str
    results: tuple[CaseResult, ...]
    ratios: tuple[tuple[float, CaseResult], ...]
    unmatched: int

    @property
    def mean(self) -> float | None:
        """Geometric mean of the ratios."""
        return geometric_mean([ratio for ratio, _ in self.ratios])

    @property
    def worst(self) -> tuple[float, CaseResult] | None:
        return min(self.ratios, key=lambda item: item[0], default=None)


def boards(selection: Selection, passes: Sequence[str] = WHOLE_PASSES) -> list[Board]:
    """One for every pass that has cases; in them what was tried and failed counts as no time of ours."""
    found = []
    for pass_ in passes:
        results = tuple(sorted((r for r in selection.results if r.case.pass_ == pass_ and r.own_rows), key=sort_key))
        if results:
            ratios = tuple((s, r) for r in results if (s := r.speedup(r.best_peer)) is not None)
            found.append(Board(pass_, results, ratios, sum(r.best_peer is None for r in results)))
    return found


def shape_label(result: CaseResult) -> str:
    """``gpt-oss (64/8 x 64), window 128, bf16, 4 x 2048``."""
    c = result.case
    batch = f"{c.batch} x " if c.batch > 1 and not c.varlen else ""
    return f"{model_label(result)}, {mask_label(c)}, {DTYPE_SHORT[c.dtype]}, {batch}{length_label(c)}"


def summary_line(board: Board) -> str:
    """How often ours is ahead, the geometric mean, the worst case."""
    if not board.ratios or board.mean is None or board.worst is None:
        return f"**{board.pass_}**: no case has a time of ours and of a peer."
    ahead = sum(ratio >= 1 for ratio, _ in board.ratios)
    ratio, where = board.worst
    alone = f"; {board.unmatched} without a peer" if board.unmatched else ""
    lost = len(board.results) - len(board.ratios) - board.unmatched
    return (f"**{board.pass_}**: ahead of the fastest peer in {ahead} of {len(board.ratios)}; best peer / ours "
            f"{times(board.mean)} in the geometric mean, {times(ratio)} in the worst ({shape_label(where)}){alone}"
            + (f"; {lost} without a time of ours" if lost else "") + ".")


def same_bits(result: CaseResult) -> Measured | None:
    """Our fastest candidate of a backward that gives the same bits each time; None where none was timed."""
    def is_reproducible(m: Measured) -> bool:
        return m.impl != "hopper" or bool(m.config) and HopperBwdConfig.from_dict(m.config).reproducible

    ours = (m for m in result.ranked if m.impl in IMPLS and is_reproducible(m))
    return min(ours, key=lambda m: m.latency_ms, default=None)


def board_markdown(board: Board) -> str:
    """The summary and a table with a row per case; of a backward also our time with the same bits each time."""
    impls = timed_impls(board.results)
    backward = board.pass_ == "bwd"
    rows, marked = [], False
    for r in board.results:
        cells, no_sink = time_cells(r, impls)
        marked |= no_sink
        tile = f"{with_impl(r.best)}, {number(r.best.row.get('tflops'))} TFLOP/s" if r.best else NONE
        if backward:
            cells.append(number(m.latency_ms, 4) if (m := same_bits(r)) else NONE)
        rows.append([shape_label(r), *cells, times(r.speedup(r.best_peer)), tile])
    head = [board.pass_, *impls, *(["ours, same bits"] if backward else []), "best peer / ours", "our config"]
    table = markdown(head, rows)
    met = sum(bool(r.duels) for r in board.results)
    duels = f" In {met} rows the fastest peers' times are by their ratio to ours in the same moments." if met else ""
    return (f"{summary_line(board)} Device time in ms, cold L2; the fastest that applies the sink is bold.{duels}"
            f"\n\n{table}{NO_SINK if marked else ''}")
