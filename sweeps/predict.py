"""How long a sweep will take, from what its trials took in earlier runs on the same card.

A trial's seconds are known by stage. What a stage costs depends on what came before: a peer compiles for the first
trial of a kind, and the first trial of a shape computes the reference. So every stage has two means, of the first trial
of its group and of the others (means, not medians: it is sums that are predicted, and few trials are most of them):

    import        the implementation
    prepare, run  implementation, pass, dtype, head dims, heads per key head, window or none, packed or not
    inputs        the shape, in each process                              (the same tensors and reference for all)
    gate          the shape and pass, in each process
    measure, check   implementation and pass; no first one

With these, for each round of the plan,

    compile = what our kernels take to build / processes that build
    gpu     = inputs + run + gate + measure + check of all trials: only one process may be in them
    lane    = all stages of the trials of one process; ours are one, the peers' are dealt out to theirs
    round   = max(compile, gpu, slowest lane) + TURNAROUND_S x trials of the slowest lane
    total   = START_S + rounds + finals

With one process for all (no GPU, or an older run) the lane is the sum of all.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash_sink_attn.devices import gpu_slug
from sweeps.cases import Case
from sweeps.plan import Plan, Trial
from sweeps.registry import is_peer
from sweeps.store import StoreError, read_environment, read_rows

GPU_STAGES = ("inputs", "run", "gate", "measure", "check")
STAGES = ("import", "prepare", *GPU_STAGES)
START_S = 12.0          # environment, starting workers and compilers, until the first kernel is built
TURNAROUND_S = 0.01     # from a row to the next trial: log, hand-out
FINAL_S = 0.5           # a case's final, where no earlier run had any
_FOUND_S = 0.3          # builds that took less were read from the cache
_NOT_RUN = ("rejected", "unsupported", "unavailable", "duplicate")

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Who works: processes that compile, processes for peers beside the one of ours (0 = one does everything)."""

    compilers: int
    peer_workers: int


def machine_of(cores: int) -> Machine:
    """How the runner divides a machine with a GPU and so many cores when it is not told."""
    return Machine(max(1, cores - 2), 2 if cores >= 8 else 1)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Attributes: seconds of a run that finds nothing compiled and of one that finds all of ours, the share of the cold
    one in which the device is busy, seconds by what they go to, and what the prediction had to do without."""

    cold_s: float
    warm_s: float
    gpu_busy: float
    parts: Mapping[str, float]
    notes: tuple[str, ...]

    def line(self) -> str:
        """For the terminal."""
        return (f"predicted: {_minutes(self.cold_s)}, GPU busy {100 * self.gpu_busy:.0f}%; "
                f"{_minutes(self.warm_s)} with all our kernels in the cache")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


class _Mean:
    """Means by group, each of the first run that has the group, and over wider groups for one that never occurred."""

    def __init__(self) -> None:
        self._values: dict[Hashable, tuple[int, list[float]]] = {}

    def add(self, keys: Sequence[Hashable], value: float, run: int) -> None:
        for key in keys:
            of, values = self._values.setdefault(key, (run, []))
            if of == run:
                values.append(value)

    def of(self, keys: Sequence[Hashable]) -> float:
        """The mean of the first of ``keys`` that occurred, 0 where none did."""
        return next((statistics.fmean(self._values[key][1]) for key in keys if key in self._values), 0.0)


class Costs:
    """What stages, builds and finals took in earlier runs.

    Args:
        runs: rows of one run each, in the order of its log; the newest run first. Of every group the newest run that
            has it counts alone: what an older version of the suite or of a peer took says little.
        finals: records of the finals of each of these runs; fewer where the last ones have none.
    """

    def __init__(self, runs: Iterable[Sequence[Row]], finals: Sequence[Sequence[Row]] = ()) -> None:
        self._stages, self._builds = _Mean(), _Mean()
        outcomes: dict[tuple[str, str], dict[int, bool]] = {}
        self.runs = 0
        held: list[Sequence[Row]] = []
        for number, rows in enumerate(runs):
            held.append(rows)
            self.runs += 1
            seen: set[Hashable] = set()
            warm = _was_warm(rows)
            for row in rows:
                runs_here = row["status"] not in _NOT_RUN
                outcome = outcomes.setdefault((row["impl"], row["pass"]), {})
                outcome[number] = outcome.get(number, False) or runs_here
                peer = is_peer(row["impl"])
                # What a cold run finds built it has built itself for another case: it belongs to what its trials cost.
                if row.get("compile_s") is not None and not peer and not (warm and row.get("cache_hit")):
                    self._builds.add([row["pass"], None], row["compile_s"], number)
                if not runs_here or not row.get("seconds"):
                    continue
                case = Case.from_dict(row["case_fields"])
                for stage in STAGES:
                    self._stages.add(_keys(stage, row["impl"], case, seen), row["seconds"].get(stage, 0.0),
                                     number)
        self.known = {impl for impl, _ in outcomes}
        # Not installed there, or able to do none of the cases: so it ended in the newest run that asked.
        self.never_run = {key for key, by_run in outcomes.items() if not by_run[min(by_run)]}
        self.final_s = _final_s(held, finals)

    def build_s(self, pass_: str) -> float:
        """Seconds to build one configuration of ours."""
        return self._builds.of([pass_, None])

    def stages(self, impl: str, case: Case, seen: set[Hashable]) -> dict[str, float]:
        """Seconds by stage of one trial; ``seen`` remembers which groups have had their first one."""
        return {stage: self._stages.of(_keys(stage, impl, case, seen)) for stage in STAGES}


def _final_s(runs: Sequence[Sequence[Row]], finals: Sequence[Sequence[Row]]) -> float:
    """Seconds of finals for each case with more than one candidate of ours, contested or not, in the runs with any."""
    spent, cases = 0.0, 0
    for rows, records in zip(runs, finals, strict=False):
        took = [sum(record["seconds"].values()) for record in records if record.get("seconds")]
        if took:
            timed = Counter(row["case"] for row in rows if row["status"] == "ok" and not is_peer(row["impl"]))
            spent += sum(took)
            cases += sum(n > 1 for n in timed.values())
    return spent / cases if cases else FINAL_S


def _keys(stage: str, impl: str, case: Case, seen: set[Hashable]) -> list[Hashable]:
    """The groups of a trial's stage, the narrowest first, each with whether it is the first one there."""
    peer, pass_ = is_peer(impl), case.pass_
    family = (pass_, case.dtype, case.head_dim, case.head_dim_v, case.heads_q // case.heads_kv, case.window is not None,
              bool(case.varlen))
    group: Hashable = {"import": (stage, impl), "prepare": (stage, impl, family), "run": (stage, impl, family),
                       "inputs": (stage, peer, case.shape_id), "gate": (stage, peer, pass_, case.shape_id)}.get(stage)
    first = group is not None and group not in seen
    seen.add(group)
    if stage == "import":
        return [(stage, impl, first), (stage, peer, first)]
    if stage in ("inputs", "gate"):
        return [(stage, peer, pass_, first), (stage, pass_, first), (stage, first)]
    return [(stage, impl, pass_, first), (stage, peer, pass_, first), (stage, peer, first)]


def history(results: Path, gpu: str, limit: int = 5) -> tuple[Costs, int | None]:
    """What is known from the latest ``limit`` runs on a card below ``results``, and how many cores the newest one had.

    ``gpu`` is the card's name, the driver's ("NVIDIA H100 80GB HBM3") or a config's ("H100"). Run directories are
    ``results/*/*``; compile-only runs and what cannot be read are passed over. Runs that had to build most of our
    kernels come before those that found them: there the peers had to build theirs as well.
    """
    found: list[tuple[str, Path, dict[str, Any]]] = []
    for path in results.glob("*/*/env.json"):
        try:
            env = read_environment(path.parent)
        except StoreError:
            continue
        if gpu_slug(env.get("gpu") or "") == gpu_slug(gpu) and env.get("timing_mode") != "compile-only":
            found.append((env.get("started", ""), path.parent, env))
    runs: list[tuple[list[Row], list[Row]]] = []
    latest = sorted(found, key=lambda item: item[:2], reverse=True)[:limit]
    for _, run_dir, env in latest:
        try:
            rows = read_rows(run_dir)
        except StoreError:
            continue
        runs.append(([row for row in rows if row["gpu"] == env["gpu"]], _finals(run_dir)))
    runs.sort(key=lambda run: _was_warm(run[0]))
    costs = Costs([rows for rows, _ in runs], [finals for _, finals in runs])
    return costs, latest[0][2].get("cpu_count") if latest else None


def _was_warm(rows: Sequence[Row]) -> bool:
    """Whether most of our kernels were in the cache when the run began.

    Of each machine code the first build counts: a cold run finds the others, which it has built itself. Runs that did
    not record what was found say it by the time a build took.
    """
    first: dict[Hashable, bool] = {}
    for number, row in enumerate(rows):
        if row.get("compile_s") is not None and not is_peer(row["impl"]) and row.get("registers") is not None:
            found = row.get("cache_hit", row["compile_s"] < _FOUND_S)
            first.setdefault(row.get("binary") or number, bool(found))
    return 2 * sum(first.values()) > len(first)


def _finals(run_dir: Path) -> list[Row]:
    try:
        lines = (run_dir / "finals.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []


def predict(plan: Plan, costs: Costs, machine: Machine, *, finals: bool) -> Prediction | None:
    """How long the plan will take.

    Args:
        finals: whether finals are run; one per case of ours with more than one candidate.

    Returns:
        None where no earlier run is known.
    """
    if not costs.runs:
        return None
    cold, warm, busy, parts = START_S, START_S, 0.0, defaultdict(float, start=START_S)
    seen: set[Hashable] = set()
    second = [trial for trials in plan.wholes for trial in trials]
    second += [_whole(plan, case, impl) for (case, impl), n in plan.combine.items()
               for _ in range(1 if case.startswith("fwd_bwd-") else n * n)]
    for trials in (plan.first, second):
        work = [t for t in trials if t.runs and (t.impl, t.case.pass_) not in costs.never_run]
        lanes, gpu = _lanes(work, costs, machine, seen)
        compile_s = sum(costs.build_s(t.case.pass_) for t in work if not is_peer(t.impl)) / machine.compilers
        compile_s *= trials is plan.first   # the second round's kernels are built by then
        slowest = max(lanes, key=lambda lane: sum(lane.values()), default={})
        turnaround = TURNAROUND_S * len(work) / max(1, len(lanes))
        lane_s = sum(slowest.values())
        cold += max(compile_s, gpu, lane_s) + turnaround
        warm += max(gpu, lane_s) + turnaround
        busy += gpu
        parts["compile"] += compile_s
        parts["turnaround"] += turnaround
        for lane in lanes:
            for stage, seconds in lane.items():
                parts[stage] += seconds
    if finals:
        candidates: defaultdict[tuple[str, str], int] = defaultdict(int)
        for trial in plan.first:
            candidates[trial.case.id, trial.impl] += trial.runs and not is_peer(trial.impl)
        parts["finals"] = costs.final_s * (sum(n > 1 for n in candidates.values()) + len(plan.combine))
        cold, warm, busy = cold + parts["finals"], warm + parts["finals"], busy + parts["finals"]
    unknown = sorted({t.impl for t in (*plan.first, *second)} - costs.known)
    notes = tuple(f"no earlier run has {impl}: taken as {'the mean peer' if is_peer(impl) else 'the mean of ours'}"
                  for impl in unknown)
    return Prediction(cold, warm, busy / cold, {k: round(v, 2) for k, v in parts.items()}, notes)


def _whole(plan: Plan, case_id: str, impl: str) -> Trial:
    return next(t for trials in plan.wholes for t in trials if t.case.id == case_id and t.impl == impl)


def _lanes(work: Sequence[Trial], costs: Costs, machine: Machine,
           seen: set[Hashable]) -> tuple[list[dict[str, float]], float]:
    """Seconds by stage of every process, and those of the device."""
    by_impl: dict[str, dict[str, float]] = {}
    for trial in work:
        spent = by_impl.setdefault(trial.impl, dict.fromkeys(STAGES, 0.0))
        for stage, seconds in costs.stages(trial.impl, trial.case, seen).items():
            spent[stage] += seconds
    gpu = sum(spent[stage] for spent in by_impl.values() for stage in GPU_STAGES)
    ours = dict.fromkeys(STAGES, 0.0)
    peers = [dict.fromkeys(STAGES, 0.0) for _ in range(machine.peer_workers)]
    for impl, spent in sorted(by_impl.items(), key=lambda item: -sum(item[1].values())):
        lane = ours if not (is_peer(impl) and peers) else min(peers, key=lambda p: sum(p.values()))
        for stage, seconds in spent.items():
            lane[stage] += seconds
    return [ours, *peers], gpu
