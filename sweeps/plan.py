"""SweepSpec -> the trials of a sweep in two rounds, the second made from the first one's results."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sweeps.candidates import candidates, canonical
from sweeps.cases import PASSES, Case
from sweeps.expand import expand
from sweeps.implementation import Implementation
from sweeps.registry import OURS, check_name, is_peer, load
from sweeps.spec import Group, ImplementationSpec, SweepSpec

PARTS = ("bwd_dq", "bwd_dkdv")
# Of an implementation that does not say so itself (``wholes``) and has both parts: the passes that are composed of
# others, and under which name the configuration of each of those goes.
Wholes = Mapping[str, Mapping[str, str]]
_OF_PARTS: Wholes = {"bwd": {part: part for part in PARTS}, "fwd_bwd": {part: part for part in ("fwd", *PARTS)}}

Load = Callable[[str, Mapping[str, Any]], Implementation]
Fastest = Mapping[tuple[str, str], list[Mapping[str, Any]]]     # (case id, impl) -> configurations, fastest first


@dataclasses.dataclass(frozen=True)
class Trial:
    """One row to be: one configuration of one implementation on one case.

    Attributes:
        case: the workload.
        impl: the impl column, a name of the YAML's implementations.
        config: tunables by name; {} = the implementation's untuned default. For a pass that is composed of others,
            their configurations by kernel: {"bwd_dq": {...}, "bwd_dkdv": {...}}.
        options: what the YAML gives the implementation.
        rejected: why this configuration cannot work on the case, None = it may.
        unsupported: why the implementation cannot do the case at all, None = it can.
        is_default: whether it is the untuned default, which speedup_vs_default refers to.
    """

    case: Case
    impl: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rejected: str | None = None
    unsupported: str | None = None
    is_default: bool = False

    @property
    def id(self) -> str:
        """Stable: case, implementation, and the configuration (a hash of it; "default" for {}).

        Options belong to it, except ``path``: moving a source does not change its numbers, and its version is in the
        row's key anyway.
        """
        parts = [self.case.id, self.impl, _short_hash(self.config) if self.config else "default"]
        options = {k: v for k, v in self.options.items() if k != "path"}
        return "/".join(parts + ([_short_hash(options)] if options else []))

    @property
    def runs(self) -> bool:
        """Whether anything has to be run to know its outcome."""
        return self.rejected is None and self.unsupported is None

    def __hash__(self) -> int:
        return hash(self.id)


def _short_hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:10]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The trials of a sweep.

    The trials of a shape stand together, and within a case the candidates of all implementations alternate, so that
    rivals are timed close in time. For the same reason peers have their backward in the second round when ours has:
    there the parts' best tiles, known by then, are timed as a whole.

    Attributes:
        first: the first round, in the order to run.
        wholes: of the second round, the trials known beforehand, case by case in the order to run.
        combine: how many of each part's best are combined, by (case id of the whole, impl).
        spec, arch: what it was made from.
    """

    first: tuple[Trial, ...]
    wholes: tuple[tuple[Trial, ...], ...]
    combine: Mapping[tuple[str, str], int]
    spec: SweepSpec
    arch: int
    load: Load = load

    def first_round(self, rows: Iterable[Mapping[str, Any]] = ()) -> list[Trial]:
        """The trials that depend on no result."""
        return list(self.first)

    def opening(self, rows: Iterable[Mapping[str, Any]] = ()) -> list[Trial]:
        """The first round, and after it the peers' trials of the second: they depend on no result either, and the
        workers that prepare peers need not wait for ours."""
        return [*self.first_round(), *(t for whole in self.wholes for t in whole if is_peer(t.impl))]

    def built_ahead(self, rows: Iterable[Mapping[str, Any]] = ()) -> list[Trial]:
        """The trials of the first round that have kernels to build without a GPU: those of ours and of the user's."""
        return [trial for trial in self.first if not is_peer(trial.impl)]

    def second_round(self, rows: Iterable[Mapping[str, Any]]) -> list[Trial]:
        """Whole passes: the peers', and ours out of the best tiles of their parts.

        Args:
            rows: with ``case`` (id), ``impl``, ``status``, ``latency_ms`` and ``config``; others are ignored.

        Returns:
            For each ``bwd`` made of parts its untuned default, then every pair of its fastest ok tiles of bwd_dq and
            bwd_dkdv, the pair of the two fastest first; for each ``fwd_bwd`` the default, then the fastest forward with
            that pair, or with the fastest backward of a kernel that does all of it. Only the default where a part has
            no ok row.
        """
        fastest = _fastest(rows)
        made: list[Trial] = []
        for trials in self.wholes:
            streams: dict[str, dict[str, Trial]] = {}
            for trial in trials:
                stream = streams.setdefault(trial.impl, {})
                stream.setdefault(trial.id, trial)
                if trial.is_default and (trial.case.id, trial.impl) in self.combine:
                    for combination in self._combinations(trial, fastest):
                        stream.setdefault(combination.id, combination)
            made += _interleave([list(stream.values()) for stream in streams.values()])
        return made

    def second_round_size(self) -> int:
        """How many trials the second round has at most."""
        return sum(map(len, self.wholes)) + sum(1 if case_id.startswith("fwd_bwd-") else n ** len(PARTS)
                                                for (case_id, _), n in self.combine.items())

    def _combinations(self, whole: Trial, fastest: Fastest) -> Iterator[Trial]:
        implementation = self.load(self.spec.implementations[whole.impl].use or whole.impl, whole.options)
        parts = wholes_of(implementation, whole.case)[whole.case.pass_]
        count = 1 if whole.case.pass_ == "fwd_bwd" else self.combine[whole.case.id, whole.impl]
        best = [fastest.get((whole.case.with_pass(part).id, whole.impl), [])[:count] for part in parts]
        for configs in itertools.product(*best):
            config = dict(zip(parts.values(), map(dict, configs), strict=True))
            yield dataclasses.replace(whole, config=config, is_default=False,
                                      rejected=implementation.rejected(whole.case, config, self.arch))


def wholes_of(implementation: Implementation, shape: Case) -> Wholes:
    """The passes of an implementation that are composed of others, by those and the names of their configurations."""
    own: Wholes | None = getattr(implementation, "wholes", None)
    if own is not None:
        return own
    split = all(implementation.unsupported(shape.with_pass(part)) is None for part in PARTS)
    return _OF_PARTS if split else {}


def _fastest(rows: Iterable[Mapping[str, Any]]) -> Fastest:
    """What was ok, without an untuned default of which only the name, {}, is known."""
    ok = sorted((row for row in rows if row["status"] == "ok" and row["config"] and row["latency_ms"] is not None),
                key=lambda row: (row["latency_ms"], canonical(row["config"])))
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in ok:
        found.setdefault((row["case"], row["impl"]), []).append(row["config"])
    return found


def make_plan(spec: SweepSpec, arch: int, *, only: str | None = None, load: Load = load) -> Plan:
    """Expands a spec.

    Args:
        arch: compute capability of the card it is to run on, 90 for Hopper; the interpreter takes the config's.
        only: a glob (fnmatch) over case ids, implementations, ``impl/case`` and model names; what matches none is left
            out. The parts that a backward needs come with it.
        load: finds an implementation by name and options.

    Raises:
        ValueError, ImportError, TypeError: an implementation that does not exist or has a misleading name, naming it.
    """
    shapes: dict[str, dict[str, dict[str, dict[str, Trial]]]] = {}   # shape -> pass -> impl -> id -> trial
    combine: dict[tuple[str, str], int] = {}
    parts_first: set[tuple[str, str]] = set()   # (case id, impl) that another pass of the implementation is made of
    for name, entry in spec.implementations.items():
        check_name(name, entry.use)
    implementations = {name: load(entry.use or name, entry.all_options())
                       for name, entry in spec.implementations.items()}
    for group in spec.resolved_groups().values():
        for shape in expand(group.shapes, spec.seed):
            passes = shapes.setdefault(shape.shape_id, {pass_: {} for pass_ in PASSES})
            for name in group.implementations or ():
                planner = _Planner(shape, name, spec.implementations[name], implementations[name], group, arch)
                for trial in planner.trials(only):
                    passes[trial.case.pass_].setdefault(name, {}).setdefault(trial.id, trial)
                    if trial.case.pass_ in planner.wholes and trial.runs:
                        combine.setdefault((trial.case.id, name), group.tunables.combine)
                    if any(trial.case.pass_ in parts for parts in planner.wholes.values()):
                        parts_first.add((trial.case.id, name))
    first: list[Trial] = []
    wholes: list[tuple[Trial, ...]] = []
    in_second = {case_id for case_id, _ in combine}
    for passes in shapes.values():
        for by_impl in passes.values():
            second: list[list[Trial]] = []
            opening: list[list[Trial]] = []
            for name, stream in by_impl.items():
                trials = list(stream.values())
                waits = trials[0].case.id in in_second and (trials[0].case.id, name) not in parts_first - set(combine)
                (second if waits else opening).append(trials)
            first += _interleave(opening)
            if second:
                wholes.append(tuple(_interleave(second)))
    return Plan(tuple(first), tuple(wholes), combine, spec, arch, load)


class _Planner:
    """The trials of one implementation on one shape."""

    def __init__(self, shape: Case, name: str, entry: ImplementationSpec, implementation: Implementation, group: Group,
                 arch: int) -> None:
        self.shape, self.name, self.entry, self.group, self.arch = shape, name, entry, group, arch
        self.implementation = implementation
        self.wholes = wholes_of(implementation, shape)

    def trials(self, only: str | None) -> Iterator[Trial]:
        asked = {p for p in self.group.passes or () if p in (self.entry.passes or PASSES)
                 and (only is None or self._matches(p, only))}
        needed = {part for whole in asked for part in self.wholes.get(whole, ())}
        for pass_ in PASSES:
            if pass_ in asked | needed:
                yield from self._of_pass(pass_)

    def _matches(self, pass_: str, only: str) -> bool:
        case_id = self.shape.with_pass(pass_).id
        names = (case_id, self.name, f"{self.name}/{case_id}", self.shape.model)
        return any(fnmatch.fnmatchcase(name, only) for name in names)

    def _of_pass(self, pass_: str) -> Iterator[Trial]:
        first = Trial(self.shape.with_pass(pass_), self.name, {}, self.entry.all_options())
        reason = self.implementation.unsupported(first.case)
        if reason is not None:
            yield dataclasses.replace(first, unsupported=reason)
            return
        configs, default = self._configs(pass_), not is_peer(self.name)
        for c in candidates(first.case, self.implementation, configs, self.arch, default=default):
            yield dataclasses.replace(first, config=c.config, rejected=c.reason, is_default=c.is_default)

    def _configs(self, pass_: str) -> list[dict[str, Any]] | None:
        """What the YAML gives, None = nothing. A whole made of parts gets its own in the second round."""
        if pass_ in self.wholes:
            return []
        configs = self.entry.grids(pass_)
        kernel = self._kernel(pass_) if self.name in OURS else None
        if configs is None and kernel is not None:
            grids = getattr(self.group.tunables, kernel)
            configs = None if grids is None else [config for grid in grids for config in grid.configs()]
        return configs

    def _kernel(self, pass_: str) -> str | None:
        """Whose tunables a pass of ours has."""
        of = getattr(self.implementation, "kernel_of", None)
        return of(pass_) if callable(of) else pass_ if pass_ in ("fwd", *PARTS) else None


def _interleave(streams: Sequence[Sequence[Trial]]) -> list[Trial]:
    """One list in which every stream is spread evenly over the whole."""
    placed = [((i + 0.5) / len(stream), n, trial) for n, stream in enumerate(streams) for i, trial in enumerate(stream)]
    return [trial for *_, trial in sorted(placed, key=lambda item: item[:2])]
