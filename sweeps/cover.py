"""The fewest configurations that serve all cases: what keeps a tuned table short."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_MOST_STEPS = 20_000


def smallest_cover(cases: Sequence[Mapping[str, float]]) -> list[str]:
    """Which configuration each case uses, of the fewest that serve them all.

    Args:
        cases: for each case the configurations that may serve it, with the ratio of its time to the case's best
            (1.0 = the best).

    Returns:
        One configuration per case: of the ones chosen, the one with its lowest ratio. Branch and bound over the cases,
        the ones with the fewest configurations first, finds the smallest set; of equally small ones the first met wins,
        where a configuration is tried before another that serves fewer cases, or as many with a higher product of
        ratios, or comes later as text. After 20 000 steps, more than tables of this size need, the best set so far is
        taken.

    Raises:
        ValueError: a case has no configuration.
    """
    if any(not options for options in cases):
        raise ValueError("cases: expected at least one configuration for each case")
    served = {config: [i for i, options in enumerate(cases) if config in options] for options in cases
              for config in options}

    def rank(config: str) -> tuple[int, float, str]:
        return -len(served[config]), sum(math.log(cases[i][config]) for i in served[config]), config

    best, steps = sorted({min(options, key=rank) for options in cases}, key=rank), 0

    def search(chosen: list[str], left: frozenset[int]) -> None:
        nonlocal best, steps
        steps += 1
        if not left:
            best = list(chosen)
            return
        if len(chosen) + 1 >= len(best) or steps > _MOST_STEPS:
            return
        hardest = min(left, key=lambda i: (len(cases[i]), i))
        for config in sorted(cases[hardest], key=rank):
            search([*chosen, config], left - set(served[config]))

    search([], frozenset(range(len(cases))))
    return [min((c for c in best if c in options), key=lambda c: (options[c], rank(c))) for options in cases]
