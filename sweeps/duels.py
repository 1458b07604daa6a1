"""Duels: the winner of a whole pass against the fastest peers, in the same moments.

A card under its power cap takes 5 to 10% longer for the same kernel once it is warm. In the first pass our candidates
come one after another and heat it, while a peer is timed after a pause in which it was prepared: on an H100
Llama-70B's forward of 16384 tokens took 6.58 ms among ours, 5.94 ms alone, and FlashAttention-3's 5.87 to 6.07. So
where who is faster could turn on it, both are timed again as finalists are (:mod:`sweeps.contest`): in randomised
blocks, whose paired ratio has nothing of what drifts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sweeps.columns import WHOLE_PASSES
from sweeps.finals import Final, trial_of
from sweeps.plan import Plan
from sweeps.select import CaseResult, select
from sweeps.store import read_finals

CLOSE = 1.3         # a first pass's ratio, either way, beyond which no drift can turn who is faster
NEAR_FASTEST = 1.1  # and of the peers those that drift could make the fastest
MOST_PEERS = 2


def duels_round(rows: Iterable[Mapping[str, Any]], plan: Plan, run_dir: Path) -> list[Final]:
    """The duels of a run whose finals are over, in the order of its cases.

    Of every whole pass of the plan whose result contains the sink: our winner and the fastest peers, where they are
    close (CLOSE, NEAR_FASTEST, MOST_PEERS).

    Args:
        rows: rows of the log; those of the environment of the last one count.

    Returns:
        [] where finals are off, and on a machine without a GPU unless the config turns them on.
    """
    found = list(rows)
    settings = plan.spec.timing.finals
    if settings.enabled is False or not found or (settings.enabled is None and found[-1]["gpu"] == "cpu"):
        return []
    here = found[-1]["environment"]
    # without duels that were held before: a run that goes on would find other peers near the fastest, and meet them too
    finals = [r for r in read_finals(run_dir) if r["environment"] == here and not r.get("against_peers")]
    selection = select([row for row in found if row["environment"] == here], finals)
    planned = {trial.case.id for trial in plan.first} | {t.case.id for whole in plan.wholes for t in whole}
    duels = [_duel(result) for result in selection.results
             if result.case.id in planned and result.case.pass_ in WHOLE_PASSES]
    return [duel for duel in duels if duel is not None]


def _duel(result: CaseResult) -> Final | None:
    best, fastest = result.best, result.best_peer
    if best is None or fastest is None or not 1 / CLOSE < fastest.latency_ms / best.latency_ms < CLOSE:
        return None
    peers = [m for m in result.peers.values()
             if m.row.get("applies_sink") and m.latency_ms <= fastest.latency_ms * NEAR_FASTEST][:MOST_PEERS]
    return Final(result.case, tuple(trial_of(result.case, m.row) for m in (best, *peers)), against_peers=True)
