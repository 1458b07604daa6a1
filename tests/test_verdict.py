"""Winners of finals, ties and how they are broken, on records whose answer is known."""

from __future__ import annotations

import csv
import itertools
import json
import random
from typing import Any

import pytest

from sweeps.contest import time_finalists
from sweeps.cost import flops
from sweeps.sampling import FinalSampling
from sweeps.select import CaseResult, select, select_run, write_best_csv
from tests import synthetic
from tests.synthetic import case, row, tile
from tests.test_contest import Simulated, calls

FWD = case("gpt-oss", "fwd", 4096, 128)
A, B, C, D = tile(64, 32), tile(64, 64), tile(64, 128), tile(128, 64)
SAMPLING = FinalSampling(max_ms=1e9, wall_ms=0.0, energy_ms=0.0)


def record(c: Any, truth: list[tuple[dict[str, Any], float]], *, noise: float = 0.004, seed: int = 1,
           **more: Any) -> dict[str, Any]:
    """The record of a final, as the runner writes it, of candidates with these true times."""
    fields = time_finalists(Simulated(noise=noise, seed=seed), calls(*(ms for _, ms in truth)), SAMPLING,
                            seed).row_fields()
    entrants = fields.pop("entrants")
    for own, (config, _) in zip(entrants, truth, strict=True):
        own |= {"key": row(c, config=config)["key"], "trial": "", "impl": "triton", "config": config,
                "status": "ok", "message": ""}
    return {"key": f"{c.id}/final", "case": c.id, "gpu": synthetic.GPU, "status": "ok", "message": "",
            "entrants": entrants, **fields} | more


def only(rows: list[dict[str, Any]], *finals: dict[str, Any]) -> CaseResult:
    (result,) = select(rows, finals).results
    return result


def test_a_final_overrules_the_first_pass() -> None:
    rows = [row(FWD, config=A, ms=1.000), row(FWD, config=B, ms=1.005), row(FWD, config=C, ms=1.2)]
    result = only(rows, record(FWD, [(A, 1.03), (B, 1.01)]))
    assert result.best is not None and result.best.config == B and [m.config for m in result.ranked] == [B, A, C]
    assert result.best.latency_ms == pytest.approx(1.01, rel=0.01) and result.best.latency_ms != 1.005
    assert result.margin is not None and result.margin[0] == pytest.approx(1.03 / 1.01 - 1, abs=0.006)
    assert 0 < result.margin[1] < result.margin[0] < result.margin[2]
    assert [m.config for m in result.tied] == [B]
    assert result.verdict is not None and result.verdict.drift == pytest.approx(1.01 / 1.005 - 1, abs=0.01)
    # what follows from the time follows from the final's time, and the log's own rows are as they were
    assert result.best.row["tflops"] == pytest.approx(flops(FWD) / result.best.latency_ms / 1e9)
    assert rows[1]["latency_ms"] == 1.005 and result.rows[1]["latency_ms"] == 1.005
    assert only(rows).best.config == A  # type: ignore[union-attr]


def test_who_was_in_the_final_for_its_wall_time_is_not_taken_for_fast() -> None:
    """All of the first pass's times, of B and D, have grown by a tenth since, as the winner's has."""
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.1), row(FWD, config=C, ms=1.3),
            row(FWD, config=D, ms=1.25)]
    result = only(rows, record(FWD, [(A, 1.1), (C, 1.3)]))
    assert [m.config for m in result.ranked] == [A, B, C, D]
    assert result.runner_up is not None and result.runner_up.latency_ms == 1.1    # as it was measured
    assert result.margin is not None and result.margin[0] == pytest.approx(0.1, abs=0.01)
    assert result.margin[1] < result.margin[0] < result.margin[2]
    assert result.verdict is not None and [m.config for m in result.verdict.entrants] == [A, C]


def test_an_untuned_default_in_the_final_is_compared_by_its_time_there() -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.2, is_default=True)]
    rows[1]["key"] = row(FWD, config=B)["key"]
    result = only(rows, record(FWD, [(A, 1.0), (B, 1.01)]))
    assert result.default is not None and result.speedup(result.default) == pytest.approx(1.01, abs=0.006)


def test_a_final_counts_only_while_the_fastest_of_the_first_pass_was_in_it() -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.0)]
    held = record(FWD, [(A, 1.02), (B, 1.0)])
    assert only(rows, held).best.config == B  # type: ignore[union-attr]
    later = [*rows, row(FWD, config=C, ms=0.9)]
    assert only(later, held).best.config == C and only(later, held).verdict is None  # type: ignore[union-attr]
    assert only(rows, held | {"status": "crashed"}).best.config == A  # type: ignore[union-attr]


def test_a_configuration_that_was_wrong_in_the_final_is_out() -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.01), row(FWD, config=C, ms=1.5)]
    held = record(FWD, [(A, 1.0), (B, 1.01)])
    held["entrants"][0] |= {"status": "incorrect", "message": "after timing: o"}
    result = only(rows, held)
    assert [m.config for m in result.ranked] == [B, C] and len(result.rows) == 3
    held["entrants"][0] |= {"status": "oom"}
    assert {json.dumps(m.config) for m in only(rows, held).ranked} == {json.dumps(x) for x in (A, B, C)}
    assert only(rows, held).best.config == B  # type: ignore[union-attr]


def family_rows(ratios: dict[int, float], pass_: str = "fwd") -> list[dict[str, Any]]:
    """Rows of neighbouring shapes in which B takes so many times as long as A."""
    found = []
    for seqlen, slower in ratios.items():
        c = case("gpt-oss", pass_, seqlen, 256)
        found += [row(c, config=A, ms=1.0), row(c, config=B, ms=slower)]
    return found


def test_a_tie_goes_to_the_configuration_that_is_best_on_the_neighbouring_shapes() -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.0)]
    tie = record(FWD, [(A, 1.0), (B, 1.0)])
    for slower, winner in ((0.95, B), (1.05, A)):
        everything = rows + family_rows({1024: slower, 2048: slower, 8192: 1.0})
        picks = set()
        for order in itertools.permutations(range(len(everything)), 3):  # whatever comes first in the log
            shuffled = [everything[i] for i in order] + [r for i, r in enumerate(everything) if i not in order]
            result = select(shuffled, [tie]).get(FWD.id)
            assert result is not None and result.best is not None and len(result.tied) == 2
            picks.add(json.dumps(result.best.config))
        assert picks == {json.dumps(winner)}
    # another model, mask or dtype is no neighbour
    stranger = case("llama-70b", "fwd", 1024, 256)
    rows_and = [*rows, row(stranger, config=A, ms=2.0), row(stranger, config=B, ms=1.0)]
    alone = select(rows_and, [tie]).get(FWD.id)
    assert alone is not None and alone.best is not None and alone.best.config == A  # the first by text


def test_among_equals_that_which_leads_elsewhere_is_taken() -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.0)]
    other = case("gpt-oss", "fwd", 8192, 128)  # only B was timed here, so that there is no common neighbour
    result = select([*rows, row(other, config=B, ms=1.0)], [record(FWD, [(A, 1.0), (B, 1.0)])]).get(FWD.id)
    assert result is not None and result.best is not None and result.best.config == B


def test_a_pair_of_backward_kernels_is_judged_by_its_parts_on_the_neighbouring_shapes() -> None:
    whole = case("gpt-oss", "bwd", 4096, 128)
    first, second = ({"bwd_dq": A, "bwd_dkdv": x} for x in (A, B))
    rows = [row(whole, config=first, ms=1.0), row(whole, config=second, ms=1.0)]
    tie = record(whole, [(first, 1.0), (second, 1.0)])
    for slower, winner in ((0.9, second), (1.1, first)):
        parts = family_rows({1024: 1.0}, "bwd_dq") + family_rows({1024: slower}, "bwd_dkdv")
        result = select(rows + parts, [tie]).get(whole.id)
        assert result is not None and result.best is not None and result.best.config == winner


def test_what_is_only_not_known_to_be_slower_is_tied_but_never_taken_for_its_neighbours() -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.0), *family_rows({1024: 0.5})]
    few = record(FWD, [(A, 1.0), (B, 1.03)], noise=0.0005)
    for own in few["entrants"]:
        own["samples_ms"] = own["samples_ms"][:4]
    result = select(rows, [few]).get(FWD.id)
    assert result is not None and result.best is not None
    assert result.best.config == A and [m.config for m in result.tied] == [A, B]


def test_the_pick_is_good_whatever_the_noise_and_never_depends_on_the_seed_alone() -> None:
    """Over many runs of noise the pick is never worse than the tie margin and a bit."""
    truth = [(A, 1.000), (B, 1.002), (C, 1.010)]
    rng = random.Random(0)
    worst = 0.0
    for seed in range(60):
        rows = [row(FWD, config=config, ms=ms * rng.uniform(0.99, 1.01)) for config, ms in truth]
        best = only(rows, record(FWD, truth, seed=seed)).best
        assert best is not None
        worst = max(worst, next(ms for config, ms in truth if config == best.config))
    assert worst <= 1.002


def best_row(result_rows: list[dict[str, Any]], finals: list[dict[str, Any]], tmp_path: Any) -> dict[str, str]:
    write_best_csv(select(result_rows, finals), tmp_path / "best.csv")
    with (tmp_path / "best.csv").open() as f:
        return next(csv.DictReader(f))


def test_what_held_the_card_back_is_told_of_the_final() -> None:
    rows = [row(FWD, config=A, ms=1.0, throttle=[]), row(FWD, config=B, ms=1.1, throttle=[])]
    best = only(rows, record(FWD, [(A, 1.0), (B, 1.1)]) | {"throttle": ["sw_power_cap"]}).best
    assert best is not None and best.row["throttle"] == ["sw_power_cap"]


def test_best_csv_says_what_the_final_found(tmp_path: Any) -> None:
    rows = [row(FWD, config=A, ms=1.0, wall_ms=1.2), row(FWD, config=B, ms=1.01, wall_ms=1.1)]
    held = record(FWD, [(A, 1.0), (B, 1.02)])
    held["entrants"][0] |= {"energy_j": 0.5, "wall_ms": 1.25, "wall_samples_ms": [1.24 + 0.001 * i for i in range(10)]}
    held["entrants"][1] |= {"wall_ms": 1.1, "wall_samples_ms": [1.09 + 0.001 * i for i in range(10)]}
    found = best_row(rows, [held], tmp_path)
    assert found["source"] == "finals" and json.loads(found["config"]) == A and found["ties"] == "1"
    assert float(found["margin_low"]) < 0.02 < float(found["margin_high"]) and found["energy_j"] == "0.5"
    assert float(found["tflops_per_w"]) == pytest.approx(flops(FWD) / 0.5 / 1e12)
    assert found["wall_disagrees"] == "True" and found["wall_ms"] == "1.25" and found["first_pass_ms"] == "1.0"
    assert found["stop_reason"] == held["stop_reason"] and int(found["samples"]) == held["blocks"]
    held["entrants"][1]["wall_samples_ms"] = held["entrants"][0]["wall_samples_ms"][::-1]
    assert best_row(rows, [held], tmp_path)["wall_disagrees"] == "False"
    without = best_row(rows, [], tmp_path)
    assert without["source"] == "first pass" and without["energy_j"] == "" == without["drift"]
    assert without["wall_disagrees"] == ""  # B looked quicker to a caller, and nothing has told whether it is
    rows[1]["wall_ms"] = 1.19
    assert best_row(rows, [], tmp_path)["wall_disagrees"] == "False"


def test_one_alone_keeps_the_time_of_the_first_pass_and_gets_its_energy(tmp_path: Any) -> None:
    held = record(FWD, [(A, 1.03)])
    held["entrants"][0] |= {"energy_j": 0.25}
    found = best_row([row(FWD, config=A, ms=1.0)], [held], tmp_path)
    assert found["source"] == "first pass" and found["latency_ms"] == "1.0" and found["energy_j"] == "0.25"
    assert float(found["drift"]) == pytest.approx(0.03, abs=0.006) and found["margin"] == ""


def test_a_run_directory_is_read_with_its_finals(tmp_path: Any) -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.01)]
    run = synthetic.write_run(tmp_path / "run", rows)
    assert select_run(run).results[0].best.config == A  # type: ignore[union-attr]
    (run / "finals.jsonl").write_text(json.dumps(record(FWD, [(A, 1.05), (B, 1.0)])) + "\n")
    assert select_run(run).results[0].best.config == B  # type: ignore[union-attr]
