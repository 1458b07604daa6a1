"""Two runs of one card, case by case: what got faster, what got slower, and what the noise does not tell."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.cases import Case
from sweeps.registry import is_peer
from sweeps.select import CaseResult, Measured, Selection, select_run
from sweeps.store import read_environment
from sweeps.tables import fastest_of_each, impl_order, sort_key

OURS = "ours"
VERDICTS = ("SLOWER", "FASTER", "UNSURE", "SAME")
SAME_WITHIN = 0.01      # a change this small either way is none
CLOCKS_WITHIN = 0.01    # SM clocks further apart than this are said, and have to agree on the verdict
# What a throttled card may be slower by, and the clocks read between samples do not show: between a run and its repeat
# on an H100 its timings moved by up to 8%, at clocks that read the same.
THROTTLED_WITHIN = 0.08

CONTROL_SPAN, CONTROL_CASES = 2.0, 5    # a case's controls take half to twice its time; fewer of them tell nothing

# Of env.json: what makes times of two runs incomparable, what makes them doubtful, and what a comparison is made for.
_CARD = ("gpu", "sm_count", "timing_mode")
_DOUBTFUL = ("driver", "cuda", "torch", "triton", "triton_env")
_LISTED = ("kernel_source", "git_commit", "packages")
_NAMES = {"gpu": "GPU", "sm_count": "SMs", "memory_bytes": "memory", "timing_mode": "timing mode", "cuda": "CUDA",
          "triton_env": "Triton environment", "kernel_source": "kernel sources", "git_commit": "commit",
          "packages": "peers"}


class CompareError(ValueError):
    """The runs cannot be compared; the message says why."""


@dataclasses.dataclass(frozen=True)
class Change:
    """What became of one case of one implementation.

    Attributes:
        impl: "ours" (the best of ours, whatever its configuration) or a peer's name.
        case, model: the case and its label.
        old, new: what was measured; times in ms.
        change: new time over old, less 1: 0.02 is 2% slower.
        low, high: the 95% interval of ``change``.
        verdict: one of VERDICTS.
        notes: what else differs: clocks, throttling, versions, unchanged peers that moved as much.
    """

    impl: str
    case: Case
    model: str
    old: Measured
    new: Measured
    change: float
    low: float
    high: float
    verdict: str
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Lost:
    """A case that was timed in the old run and was tried in the new one without a time."""

    impl: str
    case: Case
    model: str
    status: str


@dataclasses.dataclass(frozen=True)
class Control:
    """A timing of a peer whose version is the same in both runs: what moved it was not its code.

    ``ms`` is its old time, ``ratio`` new over old.
    """

    ms: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything :func:`compare` found.

    Attributes:
        old, new: names of the runs.
        gpu: their card.
        changes: by model and shape, ours first.
        lost: cases that have no time any more.
        only_old, only_new: cases of ours that one run alone has a time for (and the other did not try).
        warnings: why the verdicts may mean less than they say.
        differs: what of the environment is not the same: name, old value, new value.
        control: timings of peers with equal versions in both runs.
        same_within: the margin of SAME.
    """

    old: str
    new: str
    gpu: str
    changes: tuple[Change, ...]
    lost: tuple[Lost, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    warnings: tuple[str, ...]
    differs: tuple[tuple[str, str, str], ...]
    control: tuple[Control, ...]
    same_within: float

    def count(self, verdict: str) -> int:
        return sum(c.verdict == verdict for c in self.changes)

    def failures(self, rules: Iterable[FailOn]) -> list[str]:
        """What breaks the rules, a line each; [] = nothing does."""
        found = []
        for rule in rules:
            if rule.kind == "lost":
                found += [f"{x.impl} {x.case.id}: {x.status}, it was timed before" for x in self.lost]
            else:
                found += [f"{c.impl} {c.case.id}: SLOWER by {100 * c.change:.1f}% "
                          f"({100 * c.low:+.1f}% to {100 * c.high:+.1f}%)"
                          for c in self.changes if c.verdict == "SLOWER" and c.change > rule.threshold]
        return found


@dataclasses.dataclass(frozen=True)
class FailOn:
    """A rule of ``--fail-on``: "slower" by more than ``threshold`` (0.02 = 2%), or "lost"."""

    kind: str
    threshold: float = 0.0

    @classmethod
    def parse(cls, text: str) -> FailOn:
        """``slower:2%``, ``slower`` or ``lost``.

        Raises:
            CompareError: anything else.
        """
        match = re.fullmatch(r"(slower)(?::(\d+(?:\.\d+)?)%)?|(lost)", text.strip())
        if match is None:
            raise CompareError(f"--fail-on: expected slower:PERCENT%, slower or lost, got {text!r}")
        return cls("lost") if match[3] else cls("slower", float(match[2] or 0) / 100)


def compare(old: Path, new: Path, impls: Collection[str] = (OURS,), same_within: float = SAME_WITHIN) -> Comparison:
    """Compare two run directories.

    The change of a case is the ratio of the medians; its 95% interval comes from those of the two medians by MOVER on
    the logarithms (Zou and Donner, Statistics in Medicine 27, 2008): independent errors add in quadrature. SAME: the
    interval lies within ±same_within. FASTER, SLOWER: it lies wholly beyond. UNSURE: anything else, a side without
    samples, SM clocks that differ by more than 1% where the same change at equal clocks (time x clock) would get
    another verdict (a kernel's time follows the clock wholly, partly or not at all), or a slower side that power or
    heat held back where a change smaller by 8% would get another. The number shown is always the one measured.

    Args:
        old, new: run directories of the same card.
        impls: "ours", names of peers, "peers" (all that both runs have) or "all".
        same_within: a fraction; 0.01 = 1%.

    Raises:
        CompareError: other card or timing mode, times of the interpreter, or an implementation that neither run has.
        StoreError: not a run directory.
    """
    sides = [(read_environment(path), path) for path in (old, new)]
    envs = [env for env, _ in sides]
    _refuse(envs[0], envs[1])
    before, after = (select_run(path).on(env["gpu"]) for env, path in sides)
    names = _implementations(before, after, impls)
    control = _controls(before, after)
    changes, lost, only_old, only_new = _changes(before, after, names, same_within, control)
    return Comparison(
        Path(old).resolve().name, Path(new).resolve().name, envs[0]["gpu"], tuple(changes), tuple(lost),
        tuple(only_old), tuple(only_new), tuple(_warnings(envs, changes)), tuple(_differences(envs[0], envs[1])),
        tuple(control), same_within)


def ratio_interval(old: Measured, new: Measured) -> tuple[float, float]:
    """The 95% interval of new over old, see :func:`compare`."""
    middle = math.log(new.latency_ms / old.latency_ms)
    down = math.hypot(math.log(new.latency_ms / new.low), math.log(old.high / old.latency_ms))
    up = math.hypot(math.log(new.high / new.latency_ms), math.log(old.latency_ms / old.low))
    return math.exp(middle - down), math.exp(middle + up)


def verdict_of(low: float, high: float, same_within: float) -> str:
    """The verdict on an interval of new over old. The margin is symmetric in the ratio: 1/(1 + m) to 1 + m."""
    bottom, top = 1 / (1 + same_within), 1 + same_within
    if low > top:
        return "SLOWER"
    if high < bottom:
        return "FASTER"
    return "SAME" if bottom <= low and high <= top else "UNSURE"


def control_range(control: Sequence[Control], ms: float) -> tuple[float, float] | None:
    """How far unchanged peers of about this time moved, as new over old: the 5th and the 95th percentile, and 1."""
    near = sorted(c.ratio for c in control if ms / CONTROL_SPAN <= c.ms <= ms * CONTROL_SPAN)
    if len(near) < CONTROL_CASES:
        return None
    cut = len(near) // 20
    return min(1.0, near[cut]), max(1.0, near[-1 - cut])


def _unchanged(old: Measured, new: Measured) -> bool:
    return bool(old.row.get("versions")) and old.row["versions"] == new.row.get("versions")


def _change(impl: str, result: CaseResult, old: Measured, new: Measured, same_within: float,
            control: Sequence[Control]) -> Change:
    low, high = ratio_interval(old, new)
    verdict = verdict_of(low, high, same_within)
    notes = []
    if not (old.row.get("samples_ms") and new.row.get("samples_ms")):
        verdict = "UNSURE"
        notes.append("without samples there is no interval")
    clocks = [m.row.get("sm_clock_mhz") for m in (old, new)]
    if clocks[0] and clocks[1] and abs(clocks[1] / clocks[0] - 1) > CLOCKS_WITHIN:
        scale = clocks[1] / clocks[0]
        notes.append(f"SM clock {clocks[0]:.0f} → {clocks[1]:.0f} MHz")
        if verdict_of(low * scale, high * scale, same_within) != verdict:
            verdict = "UNSURE"
    # who is held back is slower for it: the new run's time shrinks by so much, or the old one's
    for m, when, scale in ((old, "old", 1 + THROTTLED_WITHIN), (new, "new", 1 / (1 + THROTTLED_WITHIN))):
        if m.row.get("throttle"):
            notes.append(f"{when} run throttled: {', '.join(map(str, m.row['throttle']))}")
            slower = "SLOWER" if when == "new" else "FASTER"
            if verdict == slower and verdict_of(low * scale, high * scale, same_within) != slower:
                verdict = "UNSURE"
    moved = None if is_peer(impl) and _unchanged(old, new) else control_range(control, old.latency_ms)
    if moved and verdict in ("SLOWER", "FASTER") and moved[0] <= new.latency_ms / old.latency_ms <= moved[1]:
        verdict = "UNSURE"
        notes.append(f"unchanged peers: {100 * (moved[0] - 1):+.1f}% to {100 * (moved[1] - 1):+.1f}%")
    if is_peer(impl) and old.row.get("versions") != new.row.get("versions"):
        notes.append("another version")
    return Change(impl, result.case, result.model, old, new, new.latency_ms / old.latency_ms - 1, low - 1, high - 1,
                  verdict, tuple(notes))


def _measured(result: CaseResult) -> dict[str, Measured]:
    """By name: "ours" and every peer."""
    found = {i: m for i, m in fastest_of_each(result).items() if is_peer(i)}
    return found | ({OURS: result.best} if result.best else {})


def _changes(before: Selection, after: Selection, names: Sequence[str],
             same_within: float, control: Sequence[Control],
             ) -> tuple[list[Change], list[Lost], list[str], list[str]]:
    news = {r.case.id: r for r in after.results}
    changes: list[Change] = []
    lost: list[Lost] = []
    only_old: list[str] = []
    for impl in names:
        for result in sorted(before.results, key=sort_key):
            old, other = _measured(result).get(impl), news.get(result.case.id)
            if old is None:
                continue
            new = _measured(other).get(impl) if other else None
            if new is not None:
                changes.append(_change(impl, result, old, new, same_within, control))
            elif other and (statuses := _statuses(other, impl)):
                lost.append(Lost(impl, result.case, result.model, ", ".join(statuses)))
            elif impl == OURS:
                only_old.append(result.case.id)
    olds = {r.case.id for r in before.results if r.best}
    only_new = [r.case.id for r in sorted(after.results, key=sort_key) if r.best and r.case.id not in olds]
    return changes, lost, only_old, only_new if OURS in names else []


def _statuses(result: CaseResult, impl: str) -> list[str]:
    rows = result.own_rows if impl == OURS else [r for r in result.rows if r["impl"] == impl]
    return sorted({r["status"] for r in rows})


def _implementations(before: Selection, after: Selection, wanted: Collection[str]) -> list[str]:
    there = [{i for r in s.results for i in _measured(r)} for s in (before, after)]
    both = there[0] & there[1]
    names: set[str] = set()
    for name in wanted:
        if name in ("all", "peers"):
            names |= {i for i in both if name == "all" or i != OURS}
        elif name in there[0] | there[1]:
            names.add(name)
        else:
            raise CompareError(f"--impl: expected ours, peers, all or one of {', '.join(impl_order(both))}, "
                               f"got {name!r}")
    return sorted(names, key=lambda n: (n != OURS, impl_order(names).index(n)))


def _controls(before: Selection, after: Selection) -> list[Control]:
    news = {r.case.id: _measured(r) for r in after.results}
    return [Control(old.latency_ms, new.latency_ms / old.latency_ms)
            for result in before.results for impl, old in _measured(result).items()
            if impl != OURS and (new := news.get(result.case.id, {}).get(impl)) and _unchanged(old, new)]


def _refuse(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if "cpu" in (old["gpu"], new["gpu"]):
        raise CompareError("a run without a GPU is timed in Triton's interpreter: its times mean nothing")
    for name in _CARD:
        if old.get(name) != new.get(name):
            raise CompareError(f"{_NAMES[name]}: {old.get(name)} and {new.get(name)}: their times do not compare; "
                               "python -m sweeps report OLD NEW puts them side by side")
    # the driver keeps some memory for itself, and how much is not the card's
    sizes = [env.get("memory_bytes") or 0 for env in (old, new)]
    if abs(sizes[0] - sizes[1]) > 0.02 * max(sizes):
        raise CompareError(f"memory: {sizes[0]} and {sizes[1]} bytes: these are two kinds of card; "
                           "python -m sweeps report OLD NEW puts them side by side")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(_NAMES.get(name, name), _text(old.get(name)), _text(new.get(name))) for name in (*_DOUBTFUL, *_LISTED)
            if old.get(name) != new.get(name)]


def _warnings(envs: Sequence[Mapping[str, Any]], changes: Sequence[Change]) -> list[str]:
    found = [f"another {_NAMES.get(name, name)}: {_text(envs[0].get(name))} → {_text(envs[1].get(name))}"
             for name in _DOUBTFUL if envs[0].get(name) != envs[1].get(name)]
    if envs[0].get("gpu_uuid") != envs[1].get("gpu_uuid"):
        found.append("two specimens of this card: they differ by some percent themselves")
    for env, which in zip(envs, ("old", "new"), strict=True):
        if env.get("earlier"):
            found.append(f"the {which} run was resumed in another environment; what differs is told of its last only")
    clocked = sum(any(n.startswith("SM clock") for n in c.notes) for c in changes)
    if clocked:
        found.append(f"the SM clock differs by more than {100 * CLOCKS_WITHIN:.0f}% in {clocked} of {len(changes)} "
                     "comparisons; no time was scaled for it")
    return found


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in sorted(value.items())) or "none"
    return "unknown" if value is None else str(value)
