"""Who goes on to the finals, on rows whose times are given."""

from __future__ import annotations

from typing import Any

from sweeps.finals import Final, final_sampling, finals_round
from sweeps.plan import Plan, Trial, make_plan
from sweeps.sampling import FinalSampling
from sweeps.specfile import parse_spec
from tests.synthetic import case, row, tile

SPEC = """
name: finals
device: H100
passes: [fwd, bwd]
shapes: {model: gpt-oss, window: 128, seqlen: [4096, 1024]}
tunables:
  fwd: {BLOCK_M: 64, BLOCK_N: [32, 64, 128]}
timing: {finals: {max_entrants: 3, energy_ms: 0, ENABLED}}
"""
FWD = case("gpt-oss", "fwd", 4096, 128)


def plan(settings: str = "within: 0.02") -> Plan:
    return make_plan(parse_spec(SPEC.replace("ENABLED", settings)), 90)


def logged(c: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    made = row(c, *args, **kwargs)
    trial = Trial(c, made["impl"], made["config"], {}, is_default=made["is_default"])
    return {"environment": "e1", "options": {}, "trial": trial.id} | made


def entered(rows: list[dict[str, Any]], settings: str = "within: 0.02") -> list[list[dict[str, Any]]]:
    return [[dict(entrant.config) for entrant in final.entrants] for final in finals_round(rows, plan(settings))]


def test_those_near_the_fastest_go_on_and_nobody_else() -> None:
    rows = [logged(FWD, config=tile(64, 32), ms=1.000), logged(FWD, config=tile(64, 64), ms=1.019),
            logged(FWD, config=tile(64, 128), ms=1.05), logged(FWD, "fa4", ms=0.5),
            logged(FWD, config=tile(128, 64), status="incorrect", latency_ms=0.1)]
    assert entered(rows) == [[tile(64, 32), tile(64, 64)]]
    assert entered([*rows, logged(FWD, config=tile(32, 32), ms=1.04, noise=0.1)]) == [
        [tile(64, 32), tile(64, 64), tile(32, 32)]]  # far off, but its interval overlaps
    assert entered(rows, "within: 0.01") == []
    (final,) = finals_round(rows, plan())
    assert [t.id for t in final.entrants] == [r["trial"] for r in rows[:2]]


def test_at_most_so_many_go_on_the_untuned_default_among_them() -> None:
    rows = [logged(FWD, config=tile(64, n), ms=1 + 0.001 * i) for i, n in enumerate((16, 32, 64, 128))]
    assert entered(rows) == [[tile(64, 16), tile(64, 32), tile(64, 64)]]
    rows[3] = logged(FWD, config=tile(64, 128), ms=1.003, is_default=True)
    assert entered(rows) == [[tile(64, 16), tile(64, 32), tile(64, 128)]]


def test_a_candidate_that_callers_wait_less_for_goes_on_too() -> None:
    rows = [logged(FWD, config=tile(64, 32), ms=1.0, wall_ms=1.3),
            logged(FWD, config=tile(64, 64), ms=1.1, wall_ms=1.2)]
    assert entered(rows) == [[tile(64, 32), tile(64, 64)]]
    rows[1]["wall_ms"] = 1.29
    assert entered(rows) == []


def test_who_leads_next_door_and_is_twice_too_slow_here_gets_another_chance() -> None:
    short = case("gpt-oss", "fwd", 1024, 128)
    rows = [logged(FWD, config=tile(64, 32), ms=1.0), logged(FWD, config=tile(64, 64), ms=2.0),
            logged(FWD, config=tile(64, 128), ms=2.5),
            logged(short, config=tile(64, 32), ms=0.31), logged(short, config=tile(64, 64), ms=0.30)]
    assert entered(rows) == [[tile(64, 32), tile(64, 64)]]
    nearly = [logged(FWD, config=tile(64, 16), ms=2.1), logged(short, config=tile(64, 16), ms=0.303)]
    assert entered([*rows, *nearly]) == [[tile(64, 32), tile(64, 64), tile(64, 16)], [tile(64, 64), tile(64, 16)]]
    other = {"BLOCK_M": 192, "BLOCK_N": 128, "num_stages": 2}
    rows.append(logged(FWD, "hopper", config=other, ms=0.7))    # the leader's own family of kernels is what counts
    assert entered(rows) == [[other, tile(64, 64)]]
    rows[1] = logged(FWD, config=tile(64, 64), ms=1.35)
    assert entered(rows) == []
    # a shape of another family, or another pass, says nothing
    for elsewhere in (case("gpt-oss", "fwd", 1024, None), case("gpt-oss", "bwd_dq", 1024, 128)):
        assert entered([*rows[:1], logged(FWD, config=tile(64, 64), ms=2.0),
                        logged(elsewhere, config=tile(64, 64), ms=0.3)]) == []


def test_an_unnamed_default_does_not_run_beside_its_named_twin() -> None:
    rows = [logged(FWD, config={}, ms=1.0, is_default=True, binary="x"),
            logged(FWD, config=tile(64, 64), ms=1.001, binary="x"), logged(FWD, config=tile(64, 32), ms=1.002)]
    assert entered(rows) == [[tile(64, 64), tile(64, 32)]]


def test_only_the_environment_of_the_last_row_counts_and_the_last_row_of_a_trial() -> None:
    rows = [logged(FWD, config=tile(64, 32), ms=1.0) | {"environment": "before"},
            logged(FWD, config=tile(64, 64), ms=1.0), logged(FWD, config=tile(64, 16), ms=1.0),
            logged(FWD, config=tile(64, 16), status="crashed")]
    assert entered(rows) == []
    assert entered([*rows, logged(FWD, config=tile(64, 16), ms=1.001)]) == [[tile(64, 64), tile(64, 16)]]


def test_finals_need_a_gpu_or_a_config_that_wants_them() -> None:
    rows = [logged(FWD, config=tile(64, n), ms=1.0) | {"gpu": "cpu"} for n in (32, 64)]
    assert entered(rows) == [] and finals_round([], plan()) == []
    assert len(entered(rows, "enabled: true")) == 1
    assert entered([r | {"gpu": "NVIDIA H100"} for r in rows], "enabled: false") == []


def test_one_alone_goes_on_for_the_energy_of_a_whole_pass() -> None:
    whole, part = case("gpt-oss", "bwd", 1024, 128), case("gpt-oss", "bwd_dq", 1024, 128)
    pair = {"bwd_dq": tile(64, 64), "bwd_dkdv": tile(64, 64)}
    rows = [logged(part, config=tile(64, 64), ms=1.0), logged(whole, config=pair, ms=1.0),
            logged(FWD, config=tile(64, 64), ms=1.0)]
    spec = parse_spec(SPEC.replace("energy_ms: 0, ENABLED", "energy_ms: 100"))
    found = finals_round(rows, make_plan(spec, 90))
    assert [f.case.id for f in found] == [FWD.id, whole.id]  # shape by shape, as planned
    base = final_sampling(spec.timing)
    assert base.energy_ms == 100 and found[0].sampling(base) == base
    assert Final(part, found[0].entrants).sampling(base).energy_ms == 0
    assert base == FinalSampling(energy_ms=100)


def test_a_final_is_known_by_its_entrants_in_any_order() -> None:
    a, b = Trial(FWD, "triton", tile(64, 32)), Trial(FWD, "triton", tile(64, 64))
    assert Final(FWD, (a, b)).id == Final(FWD, (b, a)).id != Final(FWD, (a,)).id
    assert Final(FWD, (a, b)).id.startswith(FWD.id) and Final(FWD, (a, b)).seed == Final(FWD, (b, a)).seed
