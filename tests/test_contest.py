"""What a contest finds out, on simulated noise whose truth is known."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sweeps import contest, paired
from sweeps.contest import time_finalists
from sweeps.energy import Energy
from sweeps.measure import CpuTimer, DeviceTimer, relative_half_width
from sweeps.paired import MIN_PAIRS, Ratio, ratio, standing
from sweeps.sampling import FinalSampling, Sampling
from sweeps.sensors import Reading

THERMAL, POWER_CAP = 0x20, 0x4


class Simulated:
    """A timer of calls that return their true milliseconds; noise of its own per sample, and drift that all share."""

    capture_failed = False

    def __init__(self, noise: float = 0.004, drift: Callable[[int], float] = lambda n: 1.0, seed: int = 1,
                 tick: float = 32e-6, outliers: float = 0.0) -> None:
        self.noise, self.drift, self.tick, self.outliers = noise, drift, tick, outliers
        self.random = random.Random(seed)
        self.taken = 0
        self.batches: list[list[int]] = []
        self.throttles: list[int] = []
        self.late: list[bool] = []
        self.energies: list[float] = []
        self.host_ms = 0.02

    def warm_up(self, call: Any, warmup_ms: float) -> tuple[float, float]:
        return self.host_ms, call()

    def batch(self, calls: Sequence[Any], spin_ms: float) -> tuple[list[tuple[float, bool]], Reading | None]:
        self.batches.append([id(call) for call in calls])
        out = []
        for call in calls:
            self.taken += 1
            ms = call() * self.drift(self.taken) * math.exp(self.random.gauss(0, self.noise))
            if self.random.random() < self.outliers:
                ms *= 3
            out.append((round(ms / self.tick) * self.tick, self.late.pop(0) if self.late else False))
        return out, Reading(1980.0, 2619.0, 500.0, 60.0, self.throttles.pop(0) if self.throttles else 0)

    def energy(self, call: Any, duration_ms: float) -> Energy | None:
        self.energies.append(call())
        return Energy(call() * 0.5, 500.0, call(), duration_ms, 10)


def calls(*ms: float) -> list[Callable[[], Any]]:
    return [lambda ms=ms: ms for ms in ms]  # type: ignore[misc]


def quarters(samples: Sequence[float]) -> list[float]:
    """The medians of the quarters of a series."""
    size = len(samples) // 4
    return sorted(statistics.median(samples[i * size:(i + 1) * size]) for i in range(4))


# Without wall time, which is taken by the clock of this machine.
QUICK = FinalSampling(max_ms=1e9, wall_ms=0.0, energy_ms=0.0)


def test_a_clear_winner_is_found_and_the_slow_drop_out() -> None:
    timer = Simulated()
    timing = time_finalists(timer, calls(0.1020, 0.1000, 0.1300), QUICK, seed=3)
    assert timing.stop_reason == "winner" and timing.standing.best == 1 and timing.standing.tied == (1,)
    own = timing.standing.ratios[0]
    assert own.low < 1.02 < own.high and own.low > 1 and timing.standing.ratios[1] == Ratio(1.0, 1.0, 1.0)
    assert len(timing.samples_ms[2]) == MIN_PAIRS <= len(timing.samples_ms[1])


def test_a_winner_is_sampled_until_its_own_time_is_known() -> None:
    for seed in range(20):
        timing = time_finalists(Simulated(noise=0.03, seed=seed), calls(0.1, 0.2), QUICK, seed)
        assert timing.stop_reason == "winner" and len(timing.samples_ms[1]) == MIN_PAIRS
        half_width = relative_half_width(timing.samples_ms[0])
        assert half_width is not None and half_width <= Sampling.precision
        assert len(timing.samples_ms[0]) == len(timing.block_placements) > MIN_PAIRS
        assert statistics.median(timing.samples_ms[0]) == pytest.approx(0.1, rel=0.02)
        assert timing.standing.ratios[1].ratio == pytest.approx(2, rel=0.1)
    short = dataclasses.replace(QUICK, max_blocks=20)
    assert len(time_finalists(Simulated(noise=0.2), calls(0.1, 0.9), short, 0).samples_ms[0]) == 20
    assert len(time_finalists(Simulated(noise=0.0), calls(0.1, 0.9), QUICK, 0).samples_ms[0]) == MIN_PAIRS


def test_a_host_that_comes_late_ends_the_winners_samples_and_keeps_the_contest() -> None:
    timer = Simulated(noise=0.2)
    timer.late = [False] * 2 * MIN_PAIRS + [True] * 1000
    timing = time_finalists(timer, calls(0.1, 0.9), QUICK, 0)
    assert timing.stop_reason == "winner" and timing.mode == "spin"
    assert [len(own) for own in timing.samples_ms] == [MIN_PAIRS, MIN_PAIRS]


def test_candidates_that_are_as_good_as_each_other_are_declared_tied() -> None:
    timing = time_finalists(Simulated(noise=0.004), calls(0.1, 0.1, 0.11), QUICK, seed=3)
    assert timing.stop_reason in ("tie", "precision")
    assert sorted(timing.standing.tied) == [0, 1]
    assert all(timing.standing.ratios[n].half_width < 0.01 for n in (0, 1))


def test_without_a_race_nobody_drops_out() -> None:
    timing = time_finalists(Simulated(), calls(0.1, 0.11, 0.13), dataclasses.replace(
        QUICK, race=False, precision=0.001, max_blocks=900), seed=3)
    assert timing.stop_reason == "precision" and len({len(own) for own in timing.samples_ms}) == 1
    assert [own.half_width < 0.001 for own in timing.standing.ratios] == [True] * 3
    assert timing.standing.ratios[2].ratio == pytest.approx(1.3, abs=0.003)


def test_a_difference_too_small_to_matter_is_a_tie_even_where_it_is_known() -> None:
    timing = time_finalists(Simulated(noise=0.0002, tick=1e-9), calls(1.0, 1.001), QUICK, seed=0)
    assert timing.stop_reason == "tie" and timing.standing.tied == (0, 1)
    assert timing.standing.ratios[1].low > 1
    assert time_finalists(Simulated(noise=0.0002, tick=1e-9), calls(1.0, 1.001), dataclasses.replace(
        QUICK, tie_margin=0.0), seed=0).stop_reason == "winner"


def test_a_difference_within_the_margin_is_seldom_a_winner_however_often_one_looks() -> None:
    timings = [time_finalists(Simulated(noise=0.004, seed=seed), calls(0.1, 0.1002), QUICK, seed) for seed in range(60)]
    assert sum(t.stop_reason == "winner" for t in timings) <= 3
    assert {t.stop_reason for t in timings} >= {"precision"}


@pytest.mark.parametrize("drift", [lambda n: 1 + 0.002 * n, lambda n: 1.3 if n % 97 > 40 else 1.0,
                                   lambda n: 1 + 0.1 * math.sin(n / 20)])
def test_what_drifts_for_all_of_them_does_not_matter(drift: Callable[[int], float]) -> None:
    timing = time_finalists(Simulated(drift=drift), calls(0.200, 0.201), dataclasses.replace(
        QUICK, max_blocks=400, tie_margin=0.0, precision=1e-9), seed=5)
    assert timing.standing.best == 0 and timing.stop_reason == "winner"
    assert timing.standing.ratios[1].ratio == pytest.approx(1.005, abs=0.003)
    # times taken one candidate after the other would differ by more than what is to be told apart
    first, *_, last = quarters(timing.samples_ms[0])
    assert abs(last / first - 1) > 0.006


def test_single_samples_far_off_do_not_decide() -> None:
    wrong = 0
    for seed in range(40):
        timing = time_finalists(Simulated(outliers=0.05, seed=seed), calls(0.100, 0.102), QUICK, seed)
        wrong += 0 not in timing.standing.tied
    assert wrong == 0


def test_looking_again_and_again_calls_an_equal_rival_slower_in_less_than_one_contest_in_twenty() -> None:
    strict = dataclasses.replace(QUICK, precision=1e-9, tie_margin=0.0)
    timings = [time_finalists(Simulated(seed=seed, tick=1e-9), calls(0.1, 0.1), strict, seed) for seed in range(300)]
    assert {t.stop_reason for t in timings} <= {"winner", "samples"}
    assert sum(t.stop_reason == "winner" for t in timings) <= 15


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(0)
    for count in (8, 20, 60):
        covered = 0
        for _ in range(400):
            a = [rng.lognormvariate(0, 0.01) for _ in range(count)]
            b = [1.01 * rng.lognormvariate(0, 0.01) for _ in range(count)]
            found = ratio(a, b)
            covered += found.low <= 1.01 <= found.high
        assert covered >= 0.98 * 400
    narrow, wide = ratio(a, b, 0.9), ratio(a, b, 0.999)
    assert wide.low < narrow.low < narrow.ratio < narrow.high < wide.high


def test_the_interval_of_eight_pairs_is_the_range_of_their_walsh_averages() -> None:
    a, b = [1.0] * 8, [1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07, 1.08]
    found = ratio(a, b)
    assert (found.low, found.high) == pytest.approx((1.01, 1.08))
    assert ratio(a[:3], b).low == pytest.approx(1.01) and ratio(a[:3], b).high == pytest.approx(1.03)
    with pytest.raises(ValueError, match="at least one pair"):
        ratio([], [])
    # of n pairs, both tails of the exact null distribution together hold at most 1%, and one step more holds more
    for count in (8, 12, 27, 40):
        total = count * (count + 1) // 2
        ways = [1] + [0] * total
        for own in range(1, count + 1):
            for value in range(total, own - 1, -1):
                ways[value] += ways[value - own]
        rank = paired._rank(count, 0.99)
        assert sum(ways[:rank]) * 2 <= 0.01 * 2**count < sum(ways[:rank + 1]) * 2
    assert abs(paired._rank(41, 0.99) - paired._rank(40, 0.99)) < 20  # where the normal approximation takes over


def test_a_tick_of_the_clock_does_not_limit_what_can_be_told_apart() -> None:
    """Both medians are the same number of ticks, and still 0.1% is seen."""
    timer = Simulated(noise=0.004, tick=0.0002, seed=2)
    timing = time_finalists(timer, calls(0.02000, 0.02008), dataclasses.replace(
        QUICK, tie_margin=0.0, precision=1e-6, max_blocks=400), seed=2)
    assert timing.standing.best == 0 and timing.stop_reason == "winner"


def test_blocks_hold_every_entrant_once_in_an_order_that_the_seed_decides() -> None:
    def orders(seed: int) -> list[list[int]]:
        timer, entrants = Simulated(), calls(0.1, 0.1, 0.1)
        time_finalists(timer, entrants, dataclasses.replace(QUICK, max_blocks=12, precision=1e-9, tie_margin=0), seed)
        flat = [[id(c) for c in entrants].index(one) for batch in timer.batches for one in batch]
        return [flat[i:i + 3] for i in range(0, len(flat), 3)]

    first = orders(7)
    assert len(first) == 12 and all(sorted(block) == [0, 1, 2] for block in first)
    assert first == orders(7) != orders(8) and len({tuple(block) for block in first}) > 2


def test_a_contest_stops_for_the_reason_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = dataclasses.replace(QUICK, max_blocks=20)
    assert time_finalists(Simulated(noise=0.2), calls(1.0, 1.0), noisy, 0).stop_reason == "samples"
    clock = iter(range(10**6))
    monkeypatch.setattr(contest.time, "perf_counter", lambda: next(clock) * 0.01)
    timing = time_finalists(Simulated(noise=0.2), calls(1.0, 1.0), dataclasses.replace(QUICK, max_ms=100.0), 0)
    assert timing.stop_reason == "time" and len(timing.samples_ms[0]) >= MIN_PAIRS
    slow = time_finalists(Simulated(noise=0.2), calls(30.0, 30.0), dataclasses.replace(QUICK, max_ms=5.0), 0)
    assert slow.stop_reason == "time" and len(slow.samples_ms[0]) == 3  # a fourfold time limit, and three at least
    assert len(slow.standing.tied) == 2  # three blocks decide nothing


def test_blocks_under_thermal_slowdown_are_taken_again_and_a_power_cap_is_recorded(
        monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(contest.time, "sleep", naps.append)
    timer = Simulated()
    timer.throttles = [THERMAL, 0, POWER_CAP]
    timing = time_finalists(timer, calls(5.0, 6.0), QUICK, 0)
    fields = timing.row_fields()
    assert len(naps) == 1 and fields["retaken_blocks"] >= 1 and fields["throttle"] == ["sw_power_cap"]
    timer = Simulated()
    timer.throttles = [THERMAL] * 1000
    lasting = time_finalists(timer, calls(5.0, 6.0), QUICK, 0)
    assert len(naps) == 4 and lasting.row_fields()["throttle"] == ["sw_thermal"] and lasting.stop_reason == "winner"


def test_blocks_for_which_the_host_came_late_do_not_count() -> None:
    timer = Simulated()
    timer.late = [False, False, True, False]
    timing = time_finalists(timer, calls(0.1, 0.12), QUICK, 0)
    assert timing.late_blocks == 1 and timing.mode == "spin" and timing.note == ""
    timer = Simulated()
    timer.late = [True] * 100_000
    bound = time_finalists(timer, calls(0.1, 0.12), QUICK, 0)
    assert bound.mode == "host_bound" and bound.note == contest.HOST_BOUND_NOTE and bound.standing.best == 0


def test_energy_is_measured_for_those_that_may_be_chosen() -> None:
    timer = Simulated()
    timing = time_finalists(timer, calls(0.1, 0.13), dataclasses.replace(QUICK, energy_ms=100.0), 0)
    entrants = timing.row_fields()["entrants"]
    assert entrants[0]["energy_j"] == pytest.approx(0.05) and entrants[0]["energy_span_ms"] == 100.0
    assert entrants[1]["energy_j"] is None and timer.energies == [0.1]
    assert time_finalists(Simulated(), calls(0.1), QUICK, 0).row_fields()["entrants"][0]["energy_j"] is None


def test_what_is_decided_stands_whatever_fails_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Simulated):
        def batch(self, calls: Sequence[Any], spin_ms: float) -> tuple[list[tuple[float, bool]], Reading | None]:
            if len(set(map(id, calls))) == 1:
                raise MemoryError("nothing left for one alone")
            return super().batch(calls, spin_ms)

        def energy(self, call: Any, duration_ms: float) -> Energy | None:
            raise MemoryError("nothing left for a loop")

    def clock(call: Any) -> float:
        raise MemoryError("nothing left for a caller")

    monkeypatch.setattr(contest, "wall_clock", lambda cuda: (clock, "a clock"))
    sampling = dataclasses.replace(QUICK, wall_ms=1.0, energy_ms=100.0)
    timing = time_finalists(Failing(noise=0.1), calls(0.1, 0.9), sampling, 0)
    assert timing.stop_reason == "winner" and timing.standing.tied == (0,)
    assert [len(own) for own in timing.samples_ms] == [MIN_PAIRS, MIN_PAIRS]
    assert timing.wall_samples_ms == ((), ()) and timing.wall_source == "" and timing.energy == (None, None)
    for what in ("no more samples of the winner: MemoryError: nothing left for one alone",
                 "no wall time: MemoryError: nothing left for a caller",
                 "no energy: MemoryError: nothing left for a loop"):
        assert what in timing.incomplete
    assert timing.row_fields()["note"] == timing.incomplete
    assert time_finalists(Simulated(noise=0.1), calls(0.1, 0.9), QUICK, 0).incomplete == ""
    with pytest.raises(MemoryError):  # before anything is decided
        time_finalists(Failing(), calls(0.1), sampling, 0)


def test_one_alone_is_timed_for_eight_blocks() -> None:
    timing = time_finalists(Simulated(), calls(0.1), QUICK, 0)
    assert timing.stop_reason == "alone" and len(timing.samples_ms[0]) == MIN_PAIRS
    with pytest.raises(ValueError, match="at least one"):
        time_finalists(Simulated(), [], QUICK, 0)


def test_the_record_survives_json_and_says_everything() -> None:
    fields = time_finalists(Simulated(), calls(0.1, 0.13), QUICK, 9).row_fields()
    assert json.loads(json.dumps(fields)) == fields
    assert fields["blocks"] == len(fields["entrants"][0]["samples_ms"]) and fields["seed"] == 9
    assert fields["entrants"][0]["latency_ms"] == pytest.approx(0.1, rel=0.01)
    assert [e["tied"] for e in fields["entrants"]] == [True, False]
    assert fields["sm_clock_mhz"] == 1980.0 and fields["stop_reason"] == "winner"
    # what is in the log is enough to come to the same standing
    assert standing([e["samples_ms"] for e in fields["entrants"]], QUICK.tie_margin).tied == (0,)


def test_wall_time_is_taken_in_blocks_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "wall_clock", lambda cuda: (lambda call: 2 * call(), "a clock"))
    timing = time_finalists(Simulated(), calls(0.1, 0.13), dataclasses.replace(QUICK, wall_ms=1.0), 0)
    fields = timing.row_fields()
    assert [e["wall_ms"] for e in fields["entrants"]] == [0.2, 0.26] and fields["wall_source"] == "a clock"
    assert len(fields["entrants"][0]["wall_samples_ms"]) == len(fields["entrants"][1]["wall_samples_ms"]) >= MIN_PAIRS


def test_in_the_interpreter_two_blocks_are_taken_and_nothing_is_decided() -> None:
    timing = time_finalists(CpuTimer(), [lambda: None, lambda: None], FinalSampling(), 0)
    assert timing.mode == "cpu" and timing.stop_reason == "samples" and len(timing.samples_ms[0]) == 2
    assert len(timing.standing.tied) == 2 and timing.energy == (None, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_two_percent_are_told_apart_and_the_winner_has_its_energy() -> None:
    timer = DeviceTimer(torch.device("cuda", 0))
    cycles = int(0.2 * timer._cycles_per_ms)
    entrants = [lambda c=c: torch.cuda._sleep(c) for c in (int(1.02 * cycles), cycles)]  # type: ignore[misc]
    timing = time_finalists(timer, entrants, FinalSampling(), 0)
    assert timing.mode == "spin" and timing.standing.best == 1 and timing.standing.tied == (1,)
    assert timing.standing.ratios[0].ratio == pytest.approx(1.02, abs=0.01)
    assert timing.energy[0] is None and len(timing.wall_samples_ms[0]) >= MIN_PAIRS
    if (spent := timing.energy[1]) is not None:  # some cards have no counter
        assert spent.energy_j > 0 and 10 < spent.power_w < 2000
        # the loop's calls wait for those of the other test processes, if there are any
        alone = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1"
        assert spent.call_ms == pytest.approx(0.2, rel=0.2) or (not alone and spent.call_ms > 0.2)
