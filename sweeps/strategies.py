"""Which configurations to try next, when there are too many to try all: ask for some, tell how they did.

A strategy works on one case and on an explicit list of valid candidates, so it can propose nothing that the launcher
would refuse. It is seeded: the same answers lead to the same questions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Config = Mapping[str, Any]

# Before TPE has a model it would ask at random. Replayed on an H100 run's 22 cases of ten candidates and more, starting
# from the untuned default's neighbours instead brings the mean regret after five trials from 0.8% to 0.6%.
_LOCAL_FIRST = 8


class Strategy(Protocol):
    """Attributes: none that count. Candidates are known by their index in the list the strategy was made with."""

    def ask(self, count: int) -> list[int]:
        """At most ``count`` candidates that were not asked for before, the most promising first; [] = none is left."""
        ...

    def tell(self, index: int, value: float | None) -> None:
        """What a candidate took, in ms; None = it did not work. Also for candidates that were not asked for."""
        ...


class Space:
    """Candidates as points, so that "near" means something.

    Every tunable that differs among them is a coordinate: of a number its rank among the numbers that occur, of
    anything else (flags, None) one of several kinds. Distances are in ranks, a different kind counting 1.
    """

    def __init__(self, candidates: Sequence[Config]) -> None:
        self.names = sorted({name for config in candidates for name in config})
        self.values: dict[str, list[Any]] = {}
        for name in self.names:
            found = {repr(config.get(name)): config.get(name) for config in candidates}
            numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found.values())
            self.values[name] = sorted(found.values()) if numbers else [found[key] for key in sorted(found)]
        self.names = [name for name in self.names if len(self.values[name]) > 1]
        self.ordered = {name: all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in self.values[name])
                        for name in self.names}
        self.points = [self.point(config) for config in candidates]

    def point(self, config: Config) -> dict[str, int]:
        """The coordinates of a candidate: by tunable the index of its value."""
        return {name: self.values[name].index(config.get(name)) for name in self.names}

    def distance(self, a: Mapping[str, int], b: Mapping[str, int]) -> float:
        return math.fsum(abs(a[name] - b[name]) if self.ordered[name] else float(a[name] != b[name])
                         for name in self.names)


class Random:
    """Candidates in random order: what every other strategy has to beat."""

    def __init__(self, candidates: Sequence[Config], seed: int) -> None:
        self._left = list(range(len(candidates)))
        random.Random(seed).shuffle(self._left)

    def ask(self, count: int) -> list[int]:
        asked, self._left = self._left[:count], self._left[count:]
        return asked

    def tell(self, index: int, value: float | None) -> None:
        if index in self._left:
            self._left.remove(index)


class Neighbourhood:
    """From the untuned default outwards: the untried candidate nearest to the best so far, ties in random order.

    Args:
        candidates: the first is where it starts, the heuristic's own choice where that is among them.
    """

    def __init__(self, candidates: Sequence[Config], seed: int) -> None:
        self._space = Space(candidates)
        self._left = set(range(len(candidates)))
        order = list(range(1, len(candidates)))
        random.Random(seed).shuffle(order)
        self._place = {index: place for place, index in enumerate([0, *order])}
        self._best: tuple[float, int] | None = None

    def skip(self, index: int) -> None:
        """Somebody else tries this one."""
        self._left.discard(index)

    def ask(self, count: int) -> list[int]:
        centre = self._space.points[self._best[1] if self._best else 0] if self._left else {}
        near = sorted(self._left, key=lambda i: (self._space.distance(self._space.points[i], centre), self._place[i]))
        self._left -= set(near[:count])
        return near[:count]

    def tell(self, index: int, value: float | None) -> None:
        self._left.discard(index)
        if value is not None and (self._best is None or value < self._best[0]):
            self._best = value, index


class Optuna:
    """A sampler of the optuna library, asked for points and told the candidates nearest to them.

    A sampler proposes any combination of values. What is tried is the untried candidate nearest to the proposal, and
    what the sampler is told is that candidate and its time, as its logarithm: a tile that takes twice as long is as bad
    for a short kernel as for a long one. A candidate that does not work counts as twice the slowest one.

    Args:
        candidates: the first is tried first, the heuristic's own choice where that is among them.
        make: sampler from a seed.
        first: so many candidates are chosen by :class:`Neighbourhood` before the sampler is asked.
    """

    def __init__(self, candidates: Sequence[Config], seed: int, make: Callable[[int], Any], first: int = 1) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._study = optuna.create_study(direction="minimize", sampler=make(seed))
        self._space = Space(candidates)
        self._left = set(range(len(candidates)))
        self._worst = 0.0
        self._local, self._local_left = Neighbourhood(candidates, seed), first
        self._distributions: dict[str, Any] = {
            name: optuna.distributions.IntDistribution(0, len(values) - 1) if self._space.ordered[name]
            else optuna.distributions.CategoricalDistribution(list(range(len(values))))
            for name, values in ((n, self._space.values[n]) for n in self._space.names)}

    def ask(self, count: int) -> list[int]:
        asked: list[int] = []
        while self._left and len(asked) < count:
            if self._local_left > 0:
                self._local_left -= 1
                nearest = self._local.ask(1)[0]
            else:
                trial = self._study.ask(self._distributions)
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                point = {name: int(value) for name, value in trial.params.items()}
                nearest = min(self._left, key=lambda i: (self._space.distance(self._space.points[i], point), i))
            self._left.discard(nearest)
            self._local.skip(nearest)
            asked.append(nearest)
        return asked

    def tell(self, index: int, value: float | None) -> None:
        self._left.discard(index)
        self._local.tell(index, value)
        if value is not None:
            self._worst = max(self._worst, value)
        taken = value if value is not None else 2 * self._worst
        if taken > 0:
            self._study.add_trial(self._optuna.trial.create_trial(
                params=self._space.points[index], distributions=self._distributions, value=math.log(taken)))


def _tpe(seed: int) -> Any:
    """Tree-structured Parzen estimators, the tunables modelled jointly."""
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_LOCAL_FIRST, multivariate=True)


def _qmc(seed: int) -> Any:
    """Quasi-Monte Carlo (scrambled Sobol): spread evenly over the space, learns nothing."""
    import warnings

    import optuna
    import scipy  # noqa: F401  (the sampler imports it at its first question, too late for an error that says so)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False,
                                          warn_asynchronous_seeding=False)


STRATEGIES: dict[str, Callable[[Sequence[Config], int], Strategy]] = {
    "tpe": lambda candidates, seed: Optuna(candidates, seed, _tpe, _LOCAL_FIRST),
    "qmc": lambda candidates, seed: Optuna(candidates, seed, _qmc),
    "neighbourhood": Neighbourhood,
    "random": Random,
}


def make_strategy(name: str, candidates: Sequence[Config], seed: int) -> Strategy:
    """A strategy by its name.

    Raises:
        ValueError: no such strategy, or one of optuna's where that is not installed.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    try:
        return STRATEGIES[name](candidates, seed)
    except ImportError as error:
        raise ValueError(f"strategy: {name} needs the extra \"search\" (optuna, scipy), neighbourhood and random do "
                         f"not ({error})") from error
