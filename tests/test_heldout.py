"""The dispatcher's whole choice, implementation and configurations, on shapes that its table does not have."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sweeps.cli
from flash_sink_attn import selection
from flash_sink_attn.config import IMPLS, KERNELS_OF, HopperBwdConfig, HopperFwdConfig, TileConfig
from flash_sink_attn.dispatch import heuristic
from flash_sink_attn.tuned_table import Entry, ShapeKey, TunedTable, TunedTableError
from flash_sink_attn.validity import limits_of
from sweeps.dispatched import make, make_hopper
from sweeps.heldout import heldout, heldout_report, leave_one_out
from sweeps.ours import shape_key
from sweeps.plan import make_plan
from sweeps.regret import call_key, summary_table
from sweeps.specfile import load_spec
from tests import synthetic
from tests.synthetic import case, row, tile

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
A, B = tile(64, 32), tile(128, 64)
H, OTHER = HopperFwdConfig(256, 64, 4, PROGRAMS_PER_SM=1).to_dict(), HopperFwdConfig(128, 64).to_dict()


def key_of(seqlen: int, window: int | None = None) -> ShapeKey:
    return ShapeKey.fixed("bfloat16", 64, 64, 64, 8, window, 1, seqlen, seqlen)


def entry(kernel: Any, config: Any, ms: float, seqlen: int = 4096) -> Entry:
    pass_ = "fwd" if "fwd" in kernel else "bwd"
    return Entry(kernel, key_of(seqlen), config, ms, pass_, None, f"the-case-{seqlen}", "r")


def table_file(path: Path, entries: Iterable[Entry], gpu: str = "h100") -> Path:
    TunedTable.build(gpu, entries, {"r": {}}, arch=90).save(path)
    return path


def forward_rows(seqlen: int, **ms: float) -> list[dict]:
    """Rows of the forward: ``a`` and ``b`` portable, ``h`` and ``other`` Hopper."""
    known = {"a": ("triton", A), "b": ("triton", B), "h": ("hopper", H), "other": ("hopper", OTHER)}
    return [row(case("gpt-oss", "fwd", seqlen), known[name][0], known[name][1], ms=t) for name, t in ms.items()]


def test_the_implementation_is_judged_with_its_configuration(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "run", [*forward_rows(3580, a=0.9, b=0.6, h=0.7), *forward_rows(
        4096, a=0.5, h=0.4)])
    entries = [entry("fwd", TileConfig(**A), 0.5), entry("hopper_fwd", HopperFwdConfig(**H), 0.4)]
    found = {p.case.seqlen_q: p for p in heldout(run, table_file(tmp_path / "h100.json", entries))}
    assert found[3580].chosen.startswith("hopper 256x64") and found[3580].rung == "nearest"
    assert found[3580].regret == pytest.approx(0.7 / 0.6)         # of both implementations', not of the Hopper rows'
    assert (found[3580].best_impl, found[3580].measured) == ("triton", 3)
    assert (found[4096].rung, found[4096].regret) == ("exact", 1.0)
    # the other way round the portable kernels are chosen, and the slow one of them is what the table leads to
    entries[0] = entry("fwd", TileConfig(**A), 0.3)
    (pick,) = (p for p in heldout(run, table_file(tmp_path / "h100.json", entries)) if p.case.seqlen_q == 3580)
    assert pick.selection.impl == "triton" and pick.regret == pytest.approx(1.5)


def test_a_backward_of_two_kernels_is_looked_up_as_the_pair(tmp_path: Path) -> None:
    c = case("gpt-oss", "bwd", 4000)  # one program for a group, there and at 4096
    rows = [row(c, config={"bwd_dq": A, "bwd_dkdv": B}, ms=2.0), row(c, config={"bwd_dq": B, "bwd_dkdv": B}, ms=1.0),
            row(c, "hopper", HopperBwdConfig(64, 128, 3).to_dict(), ms=1.6),
            row(c.with_pass("bwd_dq"), config=A, ms=0.1)]
    run = synthetic.write_run(tmp_path / "run", rows)
    entries = [entry("bwd_dq", TileConfig(**A), 1.0), entry("bwd_dkdv", TileConfig(**B), 1.0)]
    (pick,) = heldout(run, table_file(tmp_path / "h100.json", entries))
    assert (pick.subject, pick.selection.impl, pick.regret) == ("bwd", "triton", 2.0)
    assert pick.heuristic_ms == 1.6 and pick.heuristic_regret == 1.6
    assert "bwd | 1 | 1 nearest | 2.000 | 2.000 | 2.000 | 1 | 1 | 0 | 1.600" in summary_table([pick], ("bwd",))
    hopper = entry("hopper_bwd", HopperBwdConfig(64, 128, 3), 0.9)
    (pick,) = heldout(run, table_file(tmp_path / "h100.json", [*entries, hopper]))
    assert (pick.selection.impl, pick.regret) == ("hopper", 1.6)


def test_the_report(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "run", [*forward_rows(3580, b=0.6, h=0.9), *forward_rows(4096, a=0.5, h=0.4),
                                                 *forward_rows(3300, b=0.6)])
    table = table_file(tmp_path / "h100.json", [
        entry("fwd", TileConfig(**A), 0.5), entry("hopper_fwd", HopperFwdConfig(**H), 0.4)])
    text = heldout_report(run, table)
    assert "3 cases of 3 shapes" in text and "1 of them are in the table and so not held out" in text
    assert "| fwd | 3 | 2 nearest, 1 exact | 1.250 | 1.250 | 1.500 | 1 | 1 | 1 |" in text
    assert "The other implementation had the best in 2 cases" in text
    listed = {r["case"]: r for r in csv.DictReader((run / "heldout.csv").open())}
    worst = listed[case("gpt-oss", "fwd", 3580).id]
    assert (worst["impl"], worst["best_impl"], worst["entry"]) == ("hopper", "triton", "the-case-4096")
    assert float(worst["regret"]) == pytest.approx(1.5)
    lines = [x for x in (run / "heldout.md").read_text().splitlines() if x.startswith("| fwd-")]
    assert "q3300" in lines[0] and "not measured" in lines[0]           # then the costliest first
    assert "q3580" in lines[1] and "1.500" in lines[1]
    assert str(tmp_path) not in (run / "heldout.md").read_text() + (run / "heldout.csv").read_text()
    lent = heldout(run, table_file(tmp_path / "h800.json", [entry("fwd", TileConfig(**A), 0.5)], "h800"))
    assert {p.rung for p in lent} == {"other card"}
    with pytest.raises(TunedTableError, match=r"gone\.json"):
        heldout(run, tmp_path / "gone.json")
    peers = synthetic.write_run(tmp_path / "peers", [row(case("gpt-oss", "fwd", 64), "fa3", ms=1.0)])
    with pytest.raises(ValueError, match="no timed forward"):
        heldout(peers, table)


def test_leave_one_out_takes_the_shape_out_of_the_table(tmp_path: Path) -> None:
    table = table_file(tmp_path / "h100.json", [
        entry("fwd", TileConfig(**B), 0.1), entry("hopper_fwd", HopperFwdConfig(**H), 0.2),
        entry("fwd", TileConfig(**A), 0.1, 3580), entry("hopper_fwd", HopperFwdConfig(**H), 0.2, 3580)])
    run = synthetic.write_run(tmp_path / "run", forward_rows(4096, a=0.6, b=0.4))
    (own,), (without,) = heldout(run, table), leave_one_out([run], table)
    assert (own.rung, own.regret) == ("exact", 1.0)
    assert without.rung == "nearest" and without.regret == pytest.approx(1.5)
    (decision,) = without.selection.decisions
    assert decision.entry is not None and decision.entry.case == "the-case-3580"


def test_leave_one_out_of_several_runs_takes_the_newest_time(tmp_path: Path) -> None:
    table = table_file(tmp_path / "h100.json", [entry("fwd", TileConfig(**A), 0.1)])
    old = synthetic.write_run(tmp_path / "old", forward_rows(3580, a=0.9, b=0.3))
    new = synthetic.write_run(tmp_path / "new", forward_rows(3580, a=0.8), env=synthetic.ENV | {
        "started": "2026-02-02T00:00:00+00:00"})
    for runs in ([old, new], [new, old]):
        (pick,) = leave_one_out(runs, table)
        assert (pick.ms, pick.best_ms, pick.measured) == (0.8, 0.3, 2)
    done = CliRunner().invoke(sweeps.cli.app, ["heldout", "--leave-one-out", str(old), str(new), "--table", str(table)])
    assert done.exit_code == 0 and "The costliest" in done.output and (old / "leave-one-out.csv").exists()
    assert not (new / "leave-one-out.md").exists()
    several = CliRunner().invoke(sweeps.cli.app, ["heldout", str(old), str(new)])
    assert several.exit_code == 1 and "--leave-one-out for several" in several.output
    elsewhere = synthetic.ENV | {"gpu": "NVIDIA H20"}
    other = synthetic.write_run(tmp_path / "other", forward_rows(3580, a=0.8), env=elsewhere)
    with pytest.raises(ValueError, match="expected runs on one card"):
        leave_one_out([old, other], table)
    otherwise = synthetic.ENV | {"timing_mode": "another"}
    timed = synthetic.write_run(tmp_path / "timed", forward_rows(3580, a=0.8), env=otherwise)
    with pytest.raises(ValueError, match="one timing mode, got another, cold-l2-spin-1"):
        leave_one_out([old, timed], table)


def test_the_default_row_is_what_the_ladder_chooses(tmp_path: Path) -> None:
    table = {"table": str(table_file(tmp_path / "h100.json", [
        entry("fwd", TileConfig(**A), 0.1), entry("hopper_fwd", HopperFwdConfig(**OTHER), 0.2)]))}
    assert make(table).default_config(case("gpt-oss", "fwd", 3580), 90) == TileConfig(**A).to_dict()
    assert make_hopper(table).default_config(case("gpt-oss", "fwd", 3580), 90) == OTHER
    c = case("gpt-oss", "bwd", 5000)
    assert make(table).default_config(c, 90) == {
        k: heuristic(k, shape_key(c), limits_of(90)).to_dict() for k in ("bwd_dq", "bwd_dkdv")}
    assert make_hopper(table).default_config(c, 90) == heuristic("hopper_bwd", shape_key(c), limits_of(90)).to_dict()
    for wrong in ({}, {"table": "a", "card": "b"}, {"tables": "a"}):
        with pytest.raises(ValueError, match="options: expected table: FILE or card: NAME"):
            make_hopper(wrong)


@pytest.mark.parametrize(("config", "card"), [("heldout", "h100"), ("heldout-h200", "h200")])
def test_the_held_out_sweep(config: str, card: str) -> None:
    """At least 40 shapes, none of them tuned on, all of them with the dispatcher's choice among what is measured."""
    plan = make_plan(load_spec(CONFIGS / f"{config}.yaml"), 90)
    table = make({"card": card}).table
    tuned = {e.key for e in table.entries.values()}
    trials = [*plan.first, *(t for whole in plan.wholes for t in whole)]
    cases = {t.case.id: t.case for t in trials if t.case.pass_ in ("fwd", "bwd")}
    assert len({c.shape_id for c in cases.values()}) >= 40
    for c in cases.values():
        assert call_key(c) not in tuned, c.id
        chosen = selection.decide(c.pass_, call_key(c), limits_of(90), table)
        for impl in IMPLS:
            own = [t for t in trials if t.case == c and t.impl == impl and t.runs]
            (default,) = (t for t in own if t.is_default)
            decisions = chosen.decisions if chosen.impl == impl else chosen.others
            kernels = KERNELS_OF[impl][c.pass_]
            configs = [default.config] if len(kernels) == 1 else [default.config[k] for k in kernels]
            assert [dict(x) for x in configs] == [d.config.to_dict() for d in decisions], (c.id, impl)
            assert len(own) >= (2 if impl == "hopper" else 1), (c.id, impl)
    measured = plan.second_round([{"case": t.case.id, "impl": t.impl, "status": "ok", "latency_ms": 1.0,
                                   "config": t.config} for t in plan.first if t.runs])
    # 693 took 81 s
    assert sum(t.runs for t in [*plan.first, *measured]) <= 720
    assert {t.impl for t in trials} == set(IMPLS)
