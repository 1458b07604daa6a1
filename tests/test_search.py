"""Strategies ask for what they have not had, find the best of a smooth space, and a run under a budget keeps to it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sweeps.cli import app
from sweeps.devices import find_card
from sweeps.plan import Trial, make_plan
from sweeps.replay import Recorded, recorded, regrets, replay, replay_text
from sweeps.search import Search, exhaustive_line, from_exhaustive, read_records, write_record
from sweeps.spec import SweepSpec
from sweeps.strategies import STRATEGIES, Space, make_strategy

CANDIDATES = [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": s, "TMA": tma}
              for m, n, s, tma in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 3, 4), (False, True))]


def took(config: dict[str, Any]) -> float:
    """A smooth valley whose bottom is 64 x 128, 3 stages, TMA."""
    steps = abs(config["BLOCK_M"].bit_length() - 7) + abs(config["BLOCK_N"].bit_length() - 8)
    return 1.0 + 0.1 * steps + 0.05 * abs(config["num_stages"] - 3) + (0.0 if config["TMA"] else 0.07)


CASE = Recorded("case", tuple(CANDIDATES), tuple(took(c) for c in CANDIDATES))


@pytest.fixture(params=list(STRATEGIES))
def strategy(request: pytest.FixtureRequest) -> str:
    if request.param in ("tpe", "qmc"):
        pytest.importorskip("optuna")
    return str(request.param)


def test_every_candidate_is_asked_for_once_and_the_same_seed_asks_alike(strategy: str) -> None:
    orders = []
    for _ in range(2):
        search, order = make_strategy(strategy, CANDIDATES[:30], 7), []
        while asked := search.ask(4):
            order += asked
            for index in asked:
                search.tell(index, None if index == 3 else took(CANDIDATES[index]))
        orders.append(order)
    assert sorted(orders[0]) == list(range(30)) and orders[0] == orders[1]


def test_what_was_told_is_not_asked_for(strategy: str) -> None:
    search = make_strategy(strategy, CANDIDATES[:6], 0)
    for index in (0, 2, 5):
        search.tell(index, 1.0)
    assert sorted(search.ask(10)) == [1, 3, 4]
    assert search.ask(1) == []


@pytest.mark.parametrize("name", ["tpe", "neighbourhood"])
def test_those_that_learn_beat_chance(name: str) -> None:
    if name == "tpe":
        pytest.importorskip("optuna")
    mine, chance = (replay([CASE], [n], 24, 6)[0].regret for n in (name, "random"))
    assert mine[23] < 0.04
    assert mine[23] < chance[23]


def test_unknown_strategies_are_named() -> None:
    with pytest.raises(ValueError, match="strategy: expected one of tpe, .*, got 'greedy'"):
        make_strategy("greedy", CANDIDATES, 0)


def test_near_is_by_ranks_and_kinds() -> None:
    space = Space(CANDIDATES)
    assert space.names == ["BLOCK_M", "BLOCK_N", "TMA", "num_stages"]    # num_warps is the same everywhere
    a, b = (space.point(c) for c in (CANDIDATES[0], CANDIDATES[-1]))
    assert space.distance(a, b) == 3 + 3 + 3 + 1


def test_regret_is_the_distance_from_the_best_recorded() -> None:
    values = (2.0, None, 1.0, 1.5)
    case = Recorded("c", tuple(CANDIDATES[:4]), values)
    for seed in range(5):
        found = regrets(case, "random", 6, seed)
        assert found == sorted(found, reverse=True) and found[3:] == [0.0] * 3
        assert set(found) <= {float("inf"), 1.0, 0.5, 0.0}


def log_row(number: int, **more: Any) -> dict[str, Any]:
    return {"case": "fwd-x", "impl": "triton", "pass": "fwd", "status": "ok", "latency_ms": 1.0 + number,
            "trial": f"t{number}", "config": CANDIDATES[number], "is_default": False} | more


def test_a_run_is_read_with_its_duplicates_failures_and_default() -> None:
    rows = [log_row(0), log_row(1, status="duplicate", latency_ms=None, duplicate_of="t0"),
            log_row(2, status="incorrect", latency_ms=None), log_row(3, is_default=True),
            log_row(4, status="rejected", latency_ms=None), log_row(5, impl="fa3"), log_row(6, **{"pass": "bwd"})]
    cases = recorded(rows)
    assert [(c.case, c.values) for c in cases] == [("fwd-x", (4.0, 1.0, 1.0, None))]
    assert cases[0].candidates[0] == CANDIDATES[3] and cases[0].best == 1.0
    text = replay_text(rows, ["random"], 3, 2, 2)
    assert "1 cases with 2 candidates or more" in text and "| random | mean |" in text and "| fwd-x | 4 |" in text
    with pytest.raises(ValueError, match="at least 9 candidates"):
        replay_text(rows, ["random"], 3, 2, 9)


SPEC = SweepSpec.model_validate({
    "name": "searched", "device": {"name": "H100"}, "passes": ["fwd"], "implementations": ["triton", "eager"],
    "shapes": {"heads": [[8, 1]], "head_dim": [64], "seqlen": [1024, 2048]},
    "tunables": {"fwd": [{"BLOCK_M": [16, 32, 64, 128], "BLOCK_N": [16, 32, 64, 128], "num_stages": [1, 2, 3]}]}})


def run(search: Search, clock: list[float], seconds: float) -> tuple[list[dict[str, Any]], list[int]]:
    """Plays the runner: a trial takes ``seconds``."""
    rows: list[dict[str, Any]] = []
    sizes = []
    for phase in search:
        trials: list[Trial] = list(phase(rows))
        sizes.append(len(trials))
        for t in trials:
            assert t.id not in {r["trial"] for r in rows}
            config = {"TMA": False, **t.config}
            rows.append({"trial": t.id, "case": t.case.id, "impl": t.impl, "status": "ok" if t.runs else "rejected",
                         "latency_ms": took(config) if t.runs and t.config else None, "config": dict(t.config)})
            clock[0] += seconds * t.runs
    return rows, sizes


@pytest.mark.parametrize("minutes,share", [(1.0, (0.2, 0.5)), (0.1, (0.0, 0.15))])
def test_a_search_keeps_to_its_budget_and_ends_with_later_phases(minutes: float, share: tuple[float, float]) -> None:
    plan, clock, later = make_plan(SPEC, 90), [0.0], []

    def last(rows: list[dict[str, Any]]) -> list[Trial]:
        later.append(len(rows))
        return []

    search = Search(plan, minutes, "neighbourhood", None, [last, last], clock=lambda: clock[0])
    rows, sizes = run(search, clock, 2.0)
    coverage = search.coverage(rows)
    fixed = sizes[0]
    assert fixed == 2 + 2 + sum(not t.runs for t in plan.first)     # defaults, eager, what is rejected
    assert clock[0] <= 60 * minutes + 2.0 * 4 + 2.0 * 4     # the first phase, and the batch that was begun
    assert share[0] <= coverage.tried / coverage.candidates <= share[1]
    assert later == [len(rows), len(rows)]


def test_without_hurry_it_stops_where_nothing_better_comes_and_finds_the_best() -> None:
    plan, clock = make_plan(SPEC, 90), [0.0]
    search = Search(plan, 1e6, "neighbourhood", None, [], clock=lambda: clock[0])
    rows, _ = run(search, clock, 1.0)
    coverage = search.coverage(rows)
    assert coverage.settled == 2 and coverage.tried < coverage.candidates
    for pick in search.picks().values():
        assert (pick["config"]["BLOCK_M"], pick["config"]["BLOCK_N"]) == (64, 128)
    assert "searched 2 cases" in coverage.line()


def test_what_cannot_be_faster_is_skipped() -> None:
    """At a measured time that no tile but the longest reaches, the small ones' exponentials alone take longer."""
    plan = make_plan(SPEC, 90)
    search = Search(plan, 1e6, "neighbourhood", find_card("H100"), [], clock=lambda: 0.0)
    rows = [{"trial": t.id, "case": t.case.id, "impl": t.impl, "status": "ok", "latency_ms": 1e-6, "config": t.config}
            for t in plan.first if t.is_default]
    phases = iter(search)
    next(phases)(rows)
    assert list(next(phases)(rows)) == []
    coverage = search.coverage(rows)
    assert coverage.tried == 2 and coverage.pruned == coverage.candidates - 2


def test_the_record_says_how_far_from_exhaustive(tmp_path: Path) -> None:
    plan, clock = make_plan(SPEC, 90), [0.0]
    search = Search(plan, 0.2, "random", None, [], clock=lambda: clock[0])
    rows, _ = run(search, clock, 2.0)
    write_record(tmp_path, search, rows, "random", 0.2)
    (record,) = read_records(tmp_path)
    assert (record["strategy"], record["minutes"], record["cases"]) == ("random", 0.2, 2)
    assert from_exhaustive(record, rows) == {} and exhaustive_line({}) == ""
    everything: list[dict[str, Any]] = [
        {"trial": t.id, "status": "ok", "latency_ms": took({"TMA": False, **t.config})} for t in plan.first
        if t.runs and t.config]
    found = from_exhaustive(record, everything)
    assert len(found) == 2
    for name, value in found.items():
        pick = record["picks"][name]["latency_ms"]
        assert value == pytest.approx(pick / min(r["latency_ms"] for r in everything) - 1)
    assert "in the 2 cases where both were run" in exhaustive_line(found)


def test_replay_is_a_command(tmp_path: Path) -> None:
    rows = [log_row(n, key=f"k{n}", is_default=n == 0) for n in range(12)]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["replay", str(tmp_path), "--strategy", "random", "--strategy", "neighbourhood", "--trials", "5",
                 "--seeds", "3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "| neighbourhood | worst seed | 0.0% |" in done.output     # it starts at the default, here the best
    assert "| fwd-x | 12 |" in done.output
    wrong = CliRunner().invoke(app, ["replay", str(tmp_path), "--strategy", "greedy"])
    assert wrong.exit_code == 1 and "expected one of tpe" in wrong.output


def test_a_wrong_strategy_ends_before_anything_runs(tmp_path: Path) -> None:
    config = Path(__file__).resolve().parent.parent / "configs" / "cpu.yaml"
    done = CliRunner().invoke(app, ["run", str(config), "--any-gpu", "--budget", "1", "--strategy", "greedy", "--out",
                                    str(tmp_path / "run")])
    assert done.exit_code == 2 and "--strategy: expected one of tpe" in done.output
    assert not (tmp_path / "run").exists()
