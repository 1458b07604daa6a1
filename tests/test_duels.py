"""Duels: which peers the winner is timed against, and what their ratio changes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from sweeps import runner
from sweeps.board import board_markdown, boards
from sweeps.duels import duels_round
from sweeps.finals import Final
from sweeps.plan import make_plan
from sweeps.sampling import FinalSampling
from sweeps.select import select, write_best_csv
from sweeps.specfile import load_spec
from sweeps.store import read_finals, read_rows
from tests.synthetic import case, row, tile
from tests.test_finals import FWD, logged, plan
from tests.test_verdict import record
from tests.test_workers import make_spec, trials

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
A, B = tile(64, 32), tile(64, 64)


def met(rows: list[dict[str, Any]], tmp_path: Path, finals: list[dict[str, Any]] | None = None,
        settings: str = "within: 0.02") -> list[Final]:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "finals.jsonl").write_text("".join(json.dumps(f | {"environment": "e1"}) + "\n" for f in finals or ()))
    return duels_round(rows, plan(settings), tmp_path)


def test_the_winner_meets_the_fastest_peers_that_are_close(tmp_path: Path) -> None:
    rows = [logged(FWD, config=A, ms=1.00), logged(FWD, config=B, ms=1.01), logged(FWD, "fa3", ms=0.95),
            logged(FWD, "fa4", ms=1.04), logged(FWD, "cudnn", ms=1.04), logged(FWD, "flex", ms=1.2),
            logged(FWD, "sdpa_flash", ms=0.5, applies_sink=False)]
    (duel,) = met(rows, tmp_path)
    assert [(t.impl, dict(t.config)) for t in duel.entrants] == [("triton", A), ("fa3", {}), ("cudnn", {})]
    assert duel.against_peers and "/duel-" in duel.id and duel.id != Final(FWD, duel.entrants).id
    # a final has said otherwise
    (duel,) = met(rows, tmp_path, [record(FWD, [(A, 1.03), (B, 1.0)])])
    assert duel.entrants[0].config == B


def test_a_run_that_goes_on_meets_the_same_peers(tmp_path: Path) -> None:
    rows = [logged(FWD, config=A, ms=1.0), logged(FWD, "fa3", ms=0.9, is_flash=True), logged(FWD, "fa4", ms=1.0)]
    (duel,) = met(rows, tmp_path)
    assert [t.impl for t in duel.entrants] == ["triton", "fa3"]
    held = fought([("triton", A, 1.0), ("fa3", {}, 1.05)])  # fa4's first pass is near that
    assert [again.id for again in met(rows, tmp_path, [held])] == [duel.id]


@pytest.mark.parametrize(("peer_ms", "held"), [(1.29, True), (1.31, False), (0.78, True), (0.76, False)])
def test_drift_turns_nobody_who_is_far(tmp_path: Path, peer_ms: float, held: bool) -> None:
    rows = [logged(FWD, config=A, ms=1.00), logged(FWD, "fa3", ms=peer_ms)]
    assert len(met(rows, tmp_path)) == held


def test_there_is_none_without_finals_a_gpu_a_peer_or_a_winner(tmp_path: Path) -> None:
    rows = [logged(FWD, config=A, ms=1.00), logged(FWD, "fa3", ms=1.0)]
    assert met(rows, tmp_path) and not met(rows, tmp_path, settings="enabled: false")
    assert not met([r | {"gpu": "cpu"} for r in rows], tmp_path) and not met([], tmp_path)
    assert not met(rows[:1], tmp_path) and not met(rows[1:], tmp_path)
    assert not met([logged(case("gpt-oss", "fwd", 2048, 128), config=A, ms=1.0)], tmp_path)


def test_a_duel_takes_its_time_for_the_ratio_alone() -> None:
    duel = Final(FWD, (), against_peers=True).sampling(FinalSampling())
    assert (duel.race, duel.wall_ms, duel.energy_ms, duel.precision) == (False, 0.0, 0.0, 0.005)
    assert Final(FWD, ()).sampling(FinalSampling()) == FinalSampling()


def fought(truth: list[tuple[str, dict[str, Any], float]]) -> dict[str, Any]:
    made = record(FWD, [(config, ms) for _, config, ms in truth], against_peers=True)
    for own, (impl, config, _) in zip(made["entrants"], truth, strict=True):
        own |= {"impl": impl, "key": row(FWD, impl, config)["key"]}
    return made


def test_a_peers_time_is_what_it_was_beside_ours(tmp_path: Path) -> None:
    """First pass: fa3 ahead by 10%. In the same moments, on a card that was warm: behind by 2%."""
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.1), row(FWD, "fa3", ms=0.9, is_flash=True),
            row(FWD, "fa4", ms=0.95, is_flash=True), row(FWD, "eager", ms=40.0)]
    held = record(FWD, [(A, 1.0), (B, 1.1)])
    duel = fought([("triton", A, 1.20), ("fa3", {}, 1.224), ("fa4", {}, 1.26)])
    before, after = (select(rows, finals).results[0] for finals in ([held], [held, duel]))
    assert before.best_peer is not None and before.best_peer.latency_ms == 0.9 and not before.duels
    assert after.best is not None and before.best is not None and after.best.latency_ms == before.best.latency_ms
    assert after.best.config == A and after.verdict == before.verdict
    assert after.best_peer is not None and after.flash == after.best_peer == after.peers["fa3"]
    assert after.best_peer.latency_ms / after.best.latency_ms == pytest.approx(1.02, rel=0.004)
    assert after.best_peer.row["first_pass_ms"] == 0.9 and after.best_peer.low < after.best_peer.latency_ms
    assert list(after.peers) == ["fa3", "fa4", "eager"] and after.eager is not None and after.eager.latency_ms == 40.0
    assert set(after.duels) == {"fa3", "fa4"} and after.duels["fa4"].ratio == pytest.approx(1.05, rel=0.004)

    write_best_csv(select(rows, [held, duel]), tmp_path / "best.csv")
    (best,) = csv.DictReader((tmp_path / "best.csv").open())
    assert best["best_peer"] == "fa3" and best["best_peer_source"] == "duel"
    names = ("best_peer_ratio_low", "speedup_vs_best_peer", "best_peer_ratio_high")
    low, mid, high = (float(best[name]) for name in names)
    assert low < mid < high
    write_best_csv(select(rows, [held]), tmp_path / "best.csv")
    (best,) = csv.DictReader((tmp_path / "best.csv").open())
    assert best["best_peer_source"] == "first pass" and not best["best_peer_ratio_low"]

    (board,) = boards(select(rows, [held, duel]))
    assert "1.02x" in board_markdown(board) and "in the same moments" in board_markdown(board)
    (board,) = boards(select(rows, [held]))
    assert "0.899x" in board_markdown(board) and "in the same moments" not in board_markdown(board)


def test_a_peer_that_overtakes_is_the_fastest() -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, "fa3", ms=0.9, is_flash=True), row(FWD, "fa4", ms=0.95, is_flash=True)]
    result = select(rows, [fought([("triton", A, 1.0), ("fa3", {}, 1.1), ("fa4", {}, 1.05)])]).results[0]
    assert result.best_peer is not None and result.best_peer.impl == "fa4" and result.verdict is None


@pytest.mark.parametrize("change", ["failed", "another winner", "the peer failed"])
def test_a_duel_that_says_nothing_changes_nothing(change: str) -> None:
    rows = [row(FWD, config=A, ms=1.0), row(FWD, config=B, ms=1.1), row(FWD, "fa3", ms=0.9)]
    duel = fought([("triton", B if change == "another winner" else A, 1.0), ("fa3", {}, 1.2)])
    if change == "failed":
        duel["status"] = "crashed"
    if change == "the peer failed":
        duel["entrants"][1] = {k: v for k, v in duel["entrants"][1].items() if k != "samples_ms"} | {"status": "oom"}
    result = select(rows, [duel]).results[0]
    assert not result.duels and result.best_peer is not None and result.best_peer.latency_ms == 0.9


def test_a_run_holds_a_duel_in_the_process_of_ours_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    spec = make_spec(fake={"log": str(log)}, fa3_a={"log": str(log)})
    planned = [*trials(spec, "fake", {"n": 0}), *trials(spec, "fa3_a", {"n": 1})]
    duel = Final(planned[0].case, (planned[0], planned[1]), against_peers=True)
    phases: list[runner.Phase] = [lambda rows: planned, lambda rows: [duel]]
    assert runner.run(spec, tmp_path / "run", phases=phases, peer_workers=1).new_finals == 1
    (held,) = read_finals(tmp_path / "run")
    assert held["against_peers"] and held["status"] == "ok" and held["final"] == duel.id
    assert [(e["impl"], e["status"], bool(e["samples_ms"])) for e in held["entrants"]] == [
        ("fake", "ok", True), ("fa3_a", "ok", True)]
    keys = {r["impl"]: r["key"] for r in read_rows(tmp_path / "run")}
    assert [e["key"] for e in held["entrants"]] == [keys["fake"], keys["fa3_a"]]
    assert runner.run(spec, tmp_path / "run", phases=phases, peer_workers=1).new_finals == 0


def test_a_plans_duels_are_of_its_own_cases(tmp_path: Path) -> None:
    board = make_plan(load_spec(CONFIGS / "board.yaml"), 90)
    (tmp_path / "finals.jsonl").write_text("")
    there = next(t.case for t in board.first if t.case.pass_ == "fwd")
    rows = [logged(there, config=A, ms=1.0), logged(there, "fa3", ms=1.0)]
    assert [duel.case for duel in duels_round(rows, board, tmp_path)] == [there]
    assert duels_round(rows, plan("within: 0.02"), tmp_path) == []
