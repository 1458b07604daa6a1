"""The smallest set of configurations: smallest indeed, and the same one every time."""

from __future__ import annotations

import itertools
import random

import pytest

from sweeps.cover import smallest_cover


def size(cases):
    names = sorted({c for options in cases for c in options})
    return next(n for n in range(1, len(names) + 1) for some in itertools.combinations(names, n)
                if all(set(some) & set(options) for options in cases))


def test_one_configuration_that_serves_all_goes_before_the_winners():
    cases = [{"a": 1.0, "s": 1.008}, {"b": 1.0, "s": 1.005}, {"s": 1.0, "c": 1.001}]
    assert smallest_cover(cases) == ["s", "s", "s"]


def test_a_case_gets_the_fastest_of_those_chosen():
    assert smallest_cover([{"a": 1.0}, {"b": 1.0}, {"b": 1.009, "a": 1.002}]) == ["a", "b", "a"]


def test_of_equally_small_sets_the_faster():
    assert smallest_cover([{"a": 1.009, "b": 1.001}, {"a": 1.0, "b": 1.001}]) == ["b", "b"]
    assert smallest_cover([{"b": 1.0, "a": 1.0}]) == ["a"]


def test_it_is_smaller_than_what_greed_finds():
    # greed takes x, which serves four, and then needs two more; p and q serve all
    cases = [{"x": 1, "p": 1}, {"x": 1, "p": 1}, {"x": 1, "q": 1}, {"x": 1, "q": 1}, {"p": 1}, {"q": 1}]
    assert set(smallest_cover(cases)) == {"p", "q"}


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_smallest(seed):
    rng = random.Random(seed)
    cases = [{c: 1 + rng.random() / 100 for c in rng.sample("abcdefgh", rng.randint(1, 4))} for _ in range(9)]
    chosen = smallest_cover(cases)
    assert all(c in options for c, options in zip(chosen, cases, strict=True))
    assert len(set(chosen)) == size(cases)
    assert chosen == smallest_cover([dict(reversed(options.items())) for options in cases])


def test_no_cases_and_a_case_without_configurations():
    assert smallest_cover([]) == []
    with pytest.raises(ValueError, match="at least one"):
        smallest_cover([{"a": 1.0}, {}])
