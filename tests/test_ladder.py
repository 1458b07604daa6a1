"""Regret of the ladder's choices for each kernel, by leave-one-out on a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sweeps.cli
from flash_sink_attn.config import PORTABLE, HopperBwdConfig, HopperFwdConfig, TileConfig
from flash_sink_attn.dispatch import decide
from flash_sink_attn.validity import limits_of
from sweeps.ladder import distance_table, family_table, ladder_report, leave_one_out
from sweeps.ours import shape_key
from sweeps.regret import call_key, picks, summary_table
from sweeps.select import select
from tests import synthetic
from tests.synthetic import case, row, tile

A, B = tile(64, 32), tile(128, 64)


def rows_of(seqlen: int, a: float | None, b: float | None, window: int | None = None) -> list[dict]:
    c = case("gpt-oss", "fwd", seqlen, window)
    return [row(c, config=config, ms=ms) for config, ms in ((A, a), (B, b)) if ms is not None]


def test_leave_one_out_takes_the_choice_from_the_others() -> None:
    # 8192 and 4096 are an octave of work apart, 1024 is too far from both
    rows = [*rows_of(8192, 1.0, 2.0), *rows_of(4096, 0.6, 0.5), *rows_of(1024, 0.1, 0.2)]
    found = {p.case.seqlen_q: p for p in leave_one_out(select(rows), "h100", 90)}
    assert found[8192].decision.config == TileConfig(**B) and found[8192].regret == 2.0
    assert found[8192].decision.source == "nearest" and found[8192].best == "64x32 w4 s3"
    assert found[4096].decision.config == TileConfig(**A) and found[4096].regret == pytest.approx(1.2)
    assert found[1024].decision.source == "heuristic" and found[1024].regret is None      # it was not measured
    table = summary_table([*found.values()])
    assert "| fwd | 3 | 2 nearest, 1 heuristic | 1.600 | 1.600 | 2.000 | 2 | 2 | 1 | - | - | - | 3 |" in table


def test_the_hopper_kernels_are_judged_beside_the_portable_ones() -> None:
    tiles: dict[str, list[Any]] = {"fwd": [HopperFwdConfig(m, 64) for m in (64, 128)],
                                   "bwd": [HopperBwdConfig(64, 128, s) for s in (3, 2)]}
    rows = [row(case("gpt-oss", pass_, seqlen), "hopper", config.to_dict(), ms=1.0 + 0.5 * i)
            for pass_, configs in tiles.items() for seqlen in (4096, 8192) for i, config in enumerate(configs)]
    found = leave_one_out(select([*rows_of(8192, 1.0, 2.0), *rows]), "h100", 90)
    assert [p.decision.kernel for p in found].count("hopper_fwd") == 2
    assert {p.decision.source for p in found if p.decision.kernel == "hopper_bwd"} == {"nearest"}
    assert "| hopper_bwd | 2 | 2 nearest | 1.000" in summary_table(found)


def test_a_case_never_sees_its_own_entry() -> None:
    rows = synthetic.run_rows(small=True)
    for p in leave_one_out(select(rows), "h100", 90):
        assert p.decision.entry is None or p.decision.entry.key != shape_key(p.case), p.case.id
        assert p.decision.source in ("nearest", "heuristic") and (p.regret is None or p.regret >= 1)


def test_the_pairs_behind_the_rule() -> None:
    rows = [*rows_of(8192, 1.0, 2.0), *rows_of(4096, 0.6, 0.5), *rows_of(4096, 0.3, 0.1, 128)]
    selection = select(rows)
    table = distance_table(selection, 90)
    # distance 2.5: twice the work, and half the keys; the one is 2.0 times its best, the other 1.2 times
    assert "| 2 to 3 | 2 | 1.600 | 2.000 | - | - |" in table
    # 8192 and the window are farther apart than FARTHEST; to 4096 it is 2.5, and both have the same best tile
    found = family_table(selection, 90)
    assert "| nothing | 2 | 1.600 | 2.000 |" in found and "| window or none | 2 | 1.000 | 1.000 |" in found
    near = select([*rows_of(4096, 0.6, 0.5), *rows_of(4096, 0.1, 0.3, 2048)])
    assert "| window or none | 2 | 2.100 | 3.000 |" in family_table(near, 90)


def test_the_report_of_a_run(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "20260102T030405Z-h100", synthetic.run_rows(small=True))
    result = CliRunner().invoke(sweeps.cli.app, ["ladder", str(run)])
    assert result.exit_code == 0 and "Leave-one-out on 20260102T030405Z-h100" in result.output
    assert result.output.strip() in (run / "ladder.md").read_text()
    listed = list(csv.DictReader((run / "ladder.csv").open()))
    assert len(listed) == 4 * 3 and {r["kernel"] for r in listed} == set(PORTABLE)
    assert str(tmp_path) not in (run / "ladder.md").read_text() + (run / "ladder.csv").read_text()
    empty = synthetic.write_run(tmp_path / "empty", [row(case("gpt-oss", "fwd", 64), config=A, status="crashed")])
    with pytest.raises(ValueError, match="no timed case"):
        ladder_report(empty)
    assert CliRunner().invoke(sweeps.cli.app, ["ladder", str(tmp_path / "gone")]).exit_code == 1


def test_a_window_that_hides_nothing_is_looked_up_as_none() -> None:
    assert call_key(case("gpt-oss", "fwd", 128, 128)).window is None
    assert call_key(case("gpt-oss", "fwd", 129, 128)).window == 128
    packed = case("gpt-oss", "fwd", 100, 120, varlen="p", seqlens=(100, 30))
    assert call_key(packed).window == 120                                    # as the call sees it: 130 tokens


def test_peers_and_whole_passes_are_no_picks() -> None:
    c = case("gpt-oss", "fwd", 1024)
    rows = [row(c, "fa3", ms=0.01), *rows_of(1024, 0.1, 0.2),
            row(case("gpt-oss", "bwd", 1024), config={"bwd_dq": A, "bwd_dkdv": B}, ms=1.0)]
    (pick,) = picks(select(rows), lambda kernel, _, key: decide(kernel, key, limits_of(90), None), limits_of(90))
    assert pick.best_ms == 0.1 and pick.measured == 2
