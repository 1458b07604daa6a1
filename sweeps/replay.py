"""Search strategies tried on what a run has recorded: how far from the best they are after so many trials, no GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sweeps.registry import is_peer
from sweeps.strategies import Config, make_strategy
from sweeps.tables import markdown, percent

Row = Mapping[str, Any]
_NEVER_RUN = ("rejected", "unsupported", "unavailable")
_COMPOSED = ("bwd", "fwd_bwd")      # made of their parts' winners, not searched


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One case as a run knows it.

    Attributes:
        case: its id, with the implementation's name where that is not triton.
        candidates: the configurations that were tried; the untuned default first where it is known.
        values: what each took, ms; None = it did not work. One that compiled to another's machine code has its time.
    """

    case: str
    candidates: tuple[Config, ...]
    values: tuple[float | None, ...]

    @property
    def best(self) -> float:
        return min(v for v in self.values if v is not None)


def recorded(rows: Iterable[Row], at_least: int = 2) -> list[Recorded]:
    """The cases of a run that could have been searched: ours, of one kernel, with ``at_least`` candidates.

    Args:
        rows: of a trial log. Candidates that the validity rule rejects are no part of a search.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        named = row["config"] and not is_peer(row["impl"]) and row["pass"] not in _COMPOSED
        if named and row["status"] not in _NEVER_RUN:
            found.setdefault((row["case"], row["impl"]), []).append(row)
    cases = []
    for (case, impl), own in found.items():
        own.sort(key=lambda row: not row.get("is_default"))
        times = {row["trial"]: row["latency_ms"] for row in own if row["status"] == "ok"}
        values = tuple(times.get(row.get("duplicate_of") or row["trial"]) for row in own)
        if len(own) >= at_least and any(v is not None for v in values):
            name = case if impl == "triton" else f"{impl}/{case}"
            cases.append(Recorded(name, tuple(row["config"] for row in own), values))
    return cases


def regrets(case: Recorded, strategy: str, trials: int, seed: int) -> list[float]:
    """How much slower the best found is than the best there is (0.02 = 2%), after each of 1 to ``trials`` trials.

    Infinite as long as nothing that works was found; the last value stays where the candidates run out.
    """
    search = make_strategy(strategy, case.candidates, seed)
    best, found = float("inf"), []
    for _ in range(trials):
        for index in search.ask(1):
            value = case.values[index]
            search.tell(index, value)
            best = best if value is None else min(best, value)
        found.append(best / case.best - 1)
    return found


@dataclasses.dataclass(frozen=True)
class Score:
    """One strategy on one case: ``regret[n - 1]`` is the mean over the seeds after n trials, ``worst`` the largest."""

    strategy: str
    case: str
    candidates: int
    regret: tuple[float, ...]
    worst: tuple[float, ...]


def replay(cases: Sequence[Recorded], strategies: Sequence[str], trials: int, seeds: int) -> list[Score]:
    """Scores every strategy on every case.

    Args:
        trials: how many candidates of a case may be tried.
        seeds: every strategy is run so often, with different random numbers.
    """
    scores = []
    for strategy in strategies:
        for case in cases:
            runs = [regrets(case, strategy, trials, _seed(case.case, n)) for n in range(seeds)]
            scores.append(Score(strategy, case.case, len(case.candidates),
                                tuple(statistics.fmean(values) for values in zip(*runs, strict=True)),
                                tuple(max(values) for values in zip(*runs, strict=True))))
    return scores


def _seed(case: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{case}/{number}".encode()).digest()[:4], "big")


def summary_table(scores: Sequence[Score], trials: int) -> str:
    """Markdown: per strategy the regret over all cases after some numbers of trials."""
    counts = [n for n in (1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100) if n < trials] + [trials]
    rows = []
    for strategy in dict.fromkeys(s.strategy for s in scores):
        own = [s for s in scores if s.strategy == strategy]
        for what, of in (("mean", statistics.fmean), ("median case", statistics.median), ("worst case", max)):
            rows.append([strategy, what, *(_regret(of([s.regret[n - 1] for s in own])) for n in counts)])
        rows.append([strategy, "worst seed", *(_regret(max(s.worst[n - 1] for s in own)) for n in counts)])
    return markdown(["strategy", "regret", *(f"{n} trial{'s' if n > 1 else ''}" for n in counts)], rows, text_columns=2)


def _regret(value: float) -> str:
    return percent(value) if math.isfinite(value) else "nothing yet"    # in one run at least no trial had worked


def case_table(scores: Sequence[Score], trials: int) -> str:
    """Markdown: per case the mean regret of every strategy after ``trials`` trials."""
    strategies = list(dict.fromkeys(s.strategy for s in scores))
    by_case: dict[str, dict[str, Score]] = {}
    for score in scores:
        by_case.setdefault(score.case, {})[score.strategy] = score
    rows = [[case, str(next(iter(own.values())).candidates), *(_regret(own[s].regret[trials - 1]) for s in strategies)]
            for case, own in by_case.items()]
    return markdown(["case", "candidates", *strategies], rows)


def replay_text(rows: Iterable[Row], strategies: Sequence[str], trials: int, seeds: int, at_least: int) -> str:
    """Both tables, as Markdown, with a line on what they are.

    Raises:
        ValueError: no case with ``at_least`` candidates, or an unknown strategy.
    """
    cases = recorded(rows, at_least)
    if not cases:
        raise ValueError(f"replay: expected a case of ours with at least {at_least} candidates, the run has none")
    scores = replay(cases, strategies, trials, seeds)
    return "\n\n".join([
        f"{len(cases)} cases with {at_least} candidates or more, {seeds} seeds: how much slower the best found is than "
        "the best recorded. Every strategy but random starts at the untuned default.",
        summary_table(scores, trials), f"After {trials} trials, mean over the seeds:", case_table(scores, trials)])
