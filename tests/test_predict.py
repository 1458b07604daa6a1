"""The time of a sweep from earlier rows: sums that come out exactly where the costs are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sweeps.plan import make_plan
from sweeps.predict import FINAL_S, START_S, TURNAROUND_S, Costs, Machine, history, machine_of, predict
from sweeps.spec import SweepSpec

SPEC = SweepSpec.model_validate({
    "name": "two", "device": {"name": "H100"}, "passes": ["fwd"], "implementations": ["triton", "eager", "fa3"],
    "shapes": {"heads": [[8, 1]], "head_dim": [64], "seqlen": [1024, 2048]},
    "tunables": {"fwd": [{"BLOCK_M": [64], "BLOCK_N": [32, 64], "num_stages": [2, 3]}]}})
PLAN = make_plan(SPEC, 90)
STAGES = {"import": 0.0, "inputs": 0.0, "prepare": 0.01, "run": 0.001, "gate": 0.004, "measure": 0.02, "check": 0.003}


def earlier(compile_s: float = 2.0, peer_prepare: float = 3.0, **more: Any) -> list[dict[str, Any]]:
    """A run of the plan in which a peer's first call took ``peer_prepare`` and the first trial of a shape 0.5 s."""
    rows: list[dict[str, Any]] = []
    shapes, peers = set(), set()
    for t in PLAN.first:
        ours = t.impl == "triton"
        seconds = dict(STAGES)
        if (ours, t.case.shape_id) not in shapes:
            seconds["inputs"] = 0.5
        if not ours and t.impl not in peers:
            seconds["prepare"] = peer_prepare
        shapes.add((ours, t.case.shape_id))
        peers.add(t.impl)
        rows.append({"impl": t.impl, "pass": t.case.pass_, "case_fields": t.case.to_dict(), "status": "ok",
                     "gpu": "H100", "compile_s": compile_s if ours else None, "registers": 90, "key": t.id,
                     "seconds": seconds, "cache_hit": False} | more)
    return rows


def test_a_plan_like_the_earlier_run_takes_what_that_took() -> None:
    rows = earlier()
    worked = sum(sum(row["seconds"].values()) for row in rows)
    n = len(rows)
    assert n == 2 * (4 + 1 + 1 + 1)     # four tiles and the default, two peers
    found = predict(PLAN, Costs([rows]), Machine(10, 0), finals=False)
    assert found is not None
    assert found.cold_s == pytest.approx(START_S + worked + n * TURNAROUND_S)
    assert found.notes == () and found.parts["compile"] == pytest.approx(10 * 2.0 / 10)
    slow = predict(PLAN, Costs([earlier(compile_s=30.0)]), Machine(2, 0), finals=True)
    assert slow is not None and slow.cold_s == pytest.approx(
        START_S + 10 * 30.0 / 2 + n * TURNAROUND_S + 2 * FINAL_S)
    assert slow.warm_s == pytest.approx(START_S + worked + n * TURNAROUND_S + 2 * FINAL_S)
    assert "predicted: 2.7 min" in slow.line()


def test_peers_of_their_own_process_prepare_beside_ours() -> None:
    rows = earlier(peer_prepare=40.0)
    one, two, three = (predict(PLAN, Costs([rows]), Machine(10, workers), finals=False) for workers in (0, 1, 2))
    assert one and two and three
    ours = sum(sum(r["seconds"].values()) for r in rows if r["impl"] == "triton")
    assert one.cold_s - two.cold_s == pytest.approx(ours + TURNAROUND_S * 14 / 2, abs=1e-6)
    assert three.cold_s < two.cold_s - 35     # each peer's 40 s in a process of its own
    assert two.gpu_busy > one.gpu_busy


def test_the_newest_run_counts_and_unknown_peers_are_said() -> None:
    old, new = earlier(peer_prepare=100.0), [r for r in earlier(peer_prepare=1.0) if r["impl"] != "fa3"]
    found = predict(PLAN, Costs([new, old]), Machine(10, 0), finals=False)
    only = predict(PLAN, Costs([new]), Machine(10, 0), finals=False)
    assert found and only
    assert found.parts["prepare"] == pytest.approx(100 + 1 + 12 * 0.01)
    assert only.notes == ("no earlier run has fa3: taken as the mean peer",)


def test_what_was_never_installed_takes_no_time() -> None:
    rows = [r | ({"status": "unavailable", "seconds": None} if r["impl"] == "fa3" else {}) for r in earlier()]
    found = predict(PLAN, Costs([rows]), Machine(10, 0), finals=False)
    assert found is not None and found.parts["prepare"] == pytest.approx(3.0 + 11 * 0.01)


def test_what_a_cold_run_found_built_belongs_to_its_trials() -> None:
    """The same kernel serves many cases: in another run of the plan it will again be built once."""
    rows = earlier(compile_s=4.0)
    ours = [row for row in rows if row["impl"] == "triton"]
    for row in ours[::3]:
        row |= {"cache_hit": True, "compile_s": 0.1}
    mean = sum(row["compile_s"] for row in ours) / len(ours)
    found = predict(PLAN, Costs([rows]), Machine(10, 0), finals=False)
    assert found is not None and found.parts["compile"] == pytest.approx(mean)
    # however many cases share one machine code: what counts is whether its first build was found
    shared = [row | {"binary": "one"} | ({"cache_hit": True, "compile_s": 0.1} if n else {})
              for n, row in enumerate(r for r in earlier(4.0) if r["impl"] == "triton")]
    assert Costs([shared]).build_s("fwd") < 4.0
    warm = [row | ({"cache_hit": True, "compile_s": 0.1} if n > 2 else {}) for n, row in enumerate(earlier(4.0))]
    assert Costs([warm]).build_s("fwd") == 4.0  # what was missing in a warm run is what a build takes


def test_a_final_takes_what_finals_took_over_all_cases_that_could_have_had_one() -> None:
    rows = [row | {"case": row["case_fields"]["seqlen_q"]} for row in earlier()]
    finals = [{"seconds": {"gate": 0.5, "measure": 1.5}}]  # of one of the two cases; the other was decided before
    assert Costs([rows], [finals]).final_s == pytest.approx(1.0)
    assert Costs([rows, rows], [[], finals]).final_s == pytest.approx(1.0)
    assert Costs([rows]).final_s == FINAL_S


def test_without_an_earlier_run_nothing_is_predicted() -> None:
    assert predict(PLAN, Costs([]), Machine(10, 0), finals=False) is None
    assert machine_of(16) == Machine(14, 2) and machine_of(2) == Machine(1, 1)


def write_run(path: Path, rows: list[dict[str, Any]], **env: Any) -> None:
    path.mkdir(parents=True)
    (path / "env.json").write_text(json.dumps({"schema_version": 1, "fingerprint": "f", "cpu_count": 16} | env))
    (path / "trials.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_history_takes_runs_of_the_card_that_built_their_kernels_first(tmp_path: Path) -> None:
    name = "NVIDIA H100 80GB HBM3"
    cold = [r | {"gpu": name} for r in earlier(peer_prepare=7.0)]
    warm = [r | {"gpu": name, "cache_hit": True} for r in earlier(peer_prepare=0.1)]
    write_run(tmp_path / "h100/1", cold, gpu=name, started="2026-01-01")
    write_run(tmp_path / "h100/2", warm, gpu=name, started="2026-01-02", cpu_count=32)
    write_run(tmp_path / "h200/3", warm, gpu="NVIDIA H200", started="2026-01-03")
    write_run(tmp_path / "compiled-h100/4", warm, gpu="H100", started="2026-01-04", timing_mode="compile-only")
    costs, cores = history(tmp_path, "H100")
    assert (costs.runs, cores) == (2, 32)
    found = predict(PLAN, costs, Machine(10, 0), finals=False)
    assert found is not None and found.parts["prepare"] == pytest.approx(2 * 7.0 + 12 * 0.01)
    assert history(tmp_path, "A100 SXM 80GB")[0].runs == 0
