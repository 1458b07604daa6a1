"""A sweep under a budget: instead of all candidates, those that a search strategy asks for, until the time is over.

The runner turns phases into rows. Here they are: first all that is no candidate (untuned defaults, peers, what is
rejected), then batch after batch over all cases at once, so that the compilers always have work, then whatever the plan
does with the results.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.bound import throughput_bound_ms
from sweeps.devices import Card
from sweeps.plan import Plan, Trial
from sweeps.registry import is_peer
from sweeps.strategies import Strategy, make_strategy

Row = Mapping[str, Any]
Phase = Callable[[list[dict[str, Any]]], Sequence[Any]]

RECORD = "search.json"
PATIENCE = 12           # candidates of a case without a better one, after which it is given up
GAIN = 0.003            # what counts as better: less is within the noise of the first pass
MIN_CANDIDATES = 4      # fewer are simply tried
_BATCH = 2              # candidates of a case in one phase: more keep the compilers busier and learn later


@dataclasses.dataclass
class _Searched:
    """The search of one case: its candidates, and what is known of them. ``pruned`` counts those that were skipped:
    their tensor-core, exponential or memory time alone is longer than the best measured."""

    trials: list[Trial]
    strategy: Strategy
    values: dict[int, float | None] = dataclasses.field(default_factory=dict)
    best: float = math.inf
    since_gain: int = 0
    pruned: int = 0
    asked: int = 0
    over: bool = False

    def learn(self, rows: Mapping[str, Row]) -> None:
        """Takes in the rows of its candidates that are new."""
        for index, trial in enumerate(self.trials):
            if index in self.values or (row := rows.get(trial.id)) is None:
                continue
            known = row if row["status"] != "duplicate" else rows.get(row.get("duplicate_of") or "", row)
            value = known["latency_ms"] if known["status"] == "ok" else None
            self.values[index] = value
            self.strategy.tell(index, value)
            self.since_gain += 1
            if value is not None and value < self.best * (1 - GAIN):
                self.best, self.since_gain = value, 0


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How far a search was from exhaustive: cases searched, candidates in them, tried, pruned by their bound, and cases
    that were given up since nothing better came."""

    cases: int
    candidates: int
    tried: int
    pruned: int
    settled: int

    def line(self) -> str:
        """For the end of a run."""
        share = self.tried / self.candidates if self.candidates else 1.0
        return (f"searched {self.cases} cases: {self.tried} of {self.candidates} candidates tried ({share:.0%}), "
                f"{self.pruned} skipped since they cannot be faster, {self.settled} cases settled before the budget "
                "was used up")


class Search(Sequence[Phase]):
    """The phases of a run under a budget, one after another; iterate over it once.

    Args:
        plan: whose first round is searched; ``plan.second_round`` and whatever ``later`` holds follow.
        minutes: of searching, from the first batch on. What is running when they are over is finished.
        strategy: a name of sweeps.strategies.STRATEGIES.
        card: for pruning by what a configuration cannot be faster than; None = no pruning.
        later: phases after the search.
        clock: seconds, monotonic.

    Raises:
        ValueError: no such strategy, or optuna is not installed.
    """

    def __init__(self, plan: Plan, minutes: float, strategy: str, card: Card | None, later: Sequence[Phase],
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._card, self._later, self._clock = plan, card, later, clock
        self._budget_s = 60 * minutes
        groups: dict[tuple[str, str], list[Trial]] = {}
        for trial in plan.first:
            if trial.runs and not is_peer(trial.impl) and trial.config:
                groups.setdefault((trial.case.id, trial.impl), []).append(trial)
        self._searched: list[_Searched] = []
        for (case, impl), trials in groups.items():
            if len(trials) >= MIN_CANDIDATES:
                trials.sort(key=lambda trial: not trial.is_default)
                seed = int.from_bytes(hashlib.sha256(f"{plan.spec.seed}/{impl}/{case}".encode()).digest()[:4], "big")
                self._searched.append(
                    _Searched(trials, make_strategy(strategy, [t.config for t in trials], seed)))
        self._begin: float | None = None
        self._batches: list[tuple[int, float]] = []     # trials asked for, and when
        self._done = False

    def __len__(self) -> int:
        """Phases at most."""
        return 1 + sum(len(s.trials) for s in self._searched) + len(self._later)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("the phases of a search depend on its results: iterate over them")

    def __iter__(self) -> Iterator[Phase]:
        yield self._fixed
        while not self._done:
            yield self._batch
        # The batch that found nothing left to try has been the first of these.
        yield from self._later[1:]

    def picks(self) -> dict[str, dict[str, Any]]:
        """By ``case/impl``: the fastest trial that was found, its ms, how many were tried, and the candidates' ids."""
        found = {}
        for s in self._searched:
            ok = {index: value for index, value in s.values.items() if value is not None}
            if ok:
                index = min(ok, key=lambda i: ok[i])
                trial = s.trials[index]
                found[f"{trial.case.id}/{trial.impl}"] = {
                    "trial": trial.id, "config": dict(trial.config), "latency_ms": ok[index],
                    "tried": len(s.values), "candidates": [t.id for t in s.trials]}
        return found

    def coverage(self, rows: Iterable[Row]) -> Coverage:
        """What was tried, of what there was."""
        known = {row["trial"] for row in rows}
        tried = [sum(trial.id in known for trial in s.trials) for s in self._searched]
        return Coverage(len(self._searched), sum(len(s.trials) for s in self._searched), sum(tried),
                        sum(s.pruned for s in self._searched),
                        sum(s.over and n + s.pruned < len(s.trials)
                            for s, n in zip(self._searched, tried, strict=True)))

    def _fixed(self, rows: list[dict[str, Any]]) -> Sequence[Trial]:
        """What runs in any case."""
        searched = {trial.id for s in self._searched for trial in s.trials if not trial.is_default}
        return [trial for trial in self._plan.first if trial.id not in searched]

    def _batch(self, rows: list[dict[str, Any]]) -> Sequence[Any]:
        """The next candidates of all cases; after the last ones what comes after the search."""
        by_trial: dict[str, Row] = {row["trial"]: row for row in rows}
        now = self._clock()
        self._begin = now if self._begin is None else self._begin
        for s in self._searched:
            s.learn(by_trial)
        left = self._budget_s - (now - self._begin)
        asked = self._ask(self._affordable(now, left)) if left > 0 else []
        self._batches.append((len(asked), now))
        if not asked:
            self._done = True
            return self._later[0](rows) if self._later else []
        return asked

    def _affordable(self, now: float, left_s: float) -> int:
        """How many candidates the time left is good for, going by what the batches so far took."""
        tried = sum(n for n, _ in self._batches)
        return max(1, int(left_s * tried / (now - self._batches[0][1]))) if tried else 1 << 30

    def _ask(self, limit: int) -> list[Trial]:
        """At most ``limit`` candidates; the cases with the fewest tried come first."""
        asked: list[Trial] = []
        for s in sorted(self._searched, key=lambda s: s.asked):
            wanted = min(_BATCH, limit - len(asked))
            if s.over or wanted < 1:
                continue
            s.over = s.since_gain >= PATIENCE
            chosen: list[Trial] = []
            while len(chosen) < wanted and not s.over:
                found = s.strategy.ask(1)
                s.over = not found
                hopeless = {index for index in found if self._hopeless(s, index)}
                s.pruned += len(hopeless)
                chosen += [s.trials[index] for index in found if index not in s.values and index not in hopeless]
            s.asked += len(chosen)
            asked += chosen
        return asked

    def _hopeless(self, s: _Searched, index: int) -> bool:
        if self._card is None or s.trials[index].impl != "triton" or not math.isfinite(s.best):
            return False
        bound = throughput_bound_ms(s.trials[index].case, s.trials[index].config, self._card)
        return bound is not None and bound > s.best


def write_record(run_dir: Path, search: Search, rows: Iterable[Row], strategy: str, minutes: float) -> None:
    """Adds what a search found to search.json of its run, so that it can be compared with all candidates later."""
    record = {"strategy": strategy, "minutes": minutes, **dataclasses.asdict(search.coverage(rows)),
              "picks": search.picks()}
    path = run_dir / RECORD
    path.write_text(json.dumps([*read_records(run_dir), record], indent=1) + "\n")


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The searches of a run, the latest last; [] of a run without any."""
    try:
        found = json.loads((run_dir / RECORD).read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def from_exhaustive(record: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, float]:
    """How much slower the search's pick is than the best of all candidates (0.01 = 1%), by ``case/impl``.

    Args:
        record: of a search.
        rows: of one card and one environment, the search's own or another run's. A case counts where they hold every
            one of its candidates and the pick among them was timed; both times are of these rows.
    """
    status, times = {}, {}
    for row in rows:
        status[row["trial"]] = row["status"]
        if row["status"] == "ok" and row["latency_ms"] is not None:
            times[row["trial"]] = row["latency_ms"]
    regrets = {}
    for name, pick in record["picks"].items():
        if all(trial in status for trial in pick["candidates"]) and pick["trial"] in times:
            regrets[name] = times[pick["trial"]] / min(times[t] for t in pick["candidates"] if t in times) - 1
    return regrets


def exhaustive_line(regrets: Mapping[str, float]) -> str:
    """For the end of a run; "" where nothing can be compared."""
    if not regrets:
        return ""
    values = sorted(regrets.values())
    return (f"against all candidates, in the {len(values)} cases where both were run: the same pick in "
            f"{sum(v == 0 for v in values)}, regret {statistics.median(values):.1%} in the median, {values[-1]:.1%} at "
            "worst")
