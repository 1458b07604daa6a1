"""What a run says about packing: which calls stand for a packed one, the ratio, its interval, the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweeps.cli import app
from sweeps.packed import EQUAL, UNEQUAL, fixed_cases, packing_markdown, packings
from sweeps.plan import make_plan
from sweeps.select import select
from sweeps.specfile import load_spec
from tests import synthetic
from tests.synthetic import case, row, tile

CONFIGS = Path(__file__).parents[1] / "configs"


def packed(*seqlens: int, pass_: str = "fwd"):
    return case("gpt-oss", pass_, max(seqlens), 128, batch=len(seqlens), varlen="some", seqlens=seqlens)


def fixed(batch: int, length: int, pass_: str = "fwd"):
    return case("gpt-oss", pass_, length, 128, batch=batch)


def test_a_batch_stands_for_one_call_of_each_of_its_lengths() -> None:
    assert fixed_cases(packed(128, 8192, 0, 128)) == [(1, 8192, fixed(1, 8192)), (2, 128, fixed(2, 128))]
    assert fixed_cases(packed(64, 64, 64)) == [(3, 64, fixed(3, 64))]


def test_the_ratio_is_of_the_fastest_configurations_and_the_limit_that_of_its_lengths() -> None:
    found = packings(select([
        row(packed(512, 512), config=tile(64, 64), ms=1.03, noise=0.01),
        row(packed(512, 512), config=tile(64, 32), ms=2.0),
        row(fixed(2, 512), config=tile(64, 32), ms=1.0, noise=0.02), row(fixed(2, 512), config=tile(64, 64), ms=1.5),
        row(packed(512, 512), "fa3", ms=0.9), row(fixed(2, 512), "fa3", ms=0.8),
        row(packed(2048, 64), config=tile(64, 64), ms=3.31), row(fixed(1, 2048), config=tile(64, 64), ms=2.0),
        row(fixed(1, 64), config=tile(64, 64), ms=1.0),
        row(packed(512, 512, pass_="bwd"), config=tile(64, 64), ms=5.0),   # nothing to compare with
    ]))
    ratios = {(p.result.case.seqlens, p.impl): p for p in found}
    assert ratios.keys() == {((512, 512), "triton"), ((512, 512), "fa3"), ((2048, 64), "triton")}
    one = ratios[(512, 512), "triton"]
    assert one.ratio == pytest.approx(1.03) and one.limit == EQUAL
    assert one.interval[0] == pytest.approx(one.packed.low / one.parts[0][2].high) and one.interval[0] < 1.03
    assert one.interval[1] == pytest.approx(one.packed.high / one.parts[0][2].low) and one.interval[1] > 1.03
    assert ratios[(512, 512), "fa3"].ratio == pytest.approx(0.9 / 0.8)
    several = ratios[(2048, 64), "triton"]
    assert several.ratio == pytest.approx(3.31 / 3.0) and several.limit == UNEQUAL
    text = packing_markdown(found)
    assert text.startswith("1 of 3 packed calls") and "1 x 2048 + 1 x 64" in text and "2 x 512" in text
    assert [line.count("| over |") for line in text.splitlines()[-3:]] == [0, 1, 1]
    assert "64x32 w4 s3" in text     # where the fixed call's configuration is another one


def test_a_run_without_such_calls_says_so() -> None:
    assert "No varlen case" in packing_markdown(packings(select([row(packed(64, 64), config=tile(64, 64), ms=1.0)])))


def test_the_command_reads_a_run(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "20260102T030405Z-packed", [
        row(packed(512, 512), config=tile(64, 64), ms=1.0), row(fixed(2, 512), config=tile(64, 64), ms=1.0)])
    done = CliRunner().invoke(app, ["packed", str(run)])
    assert done.exit_code == 0 and "1 of 1 packed calls" in done.output
    assert CliRunner().invoke(app, ["packed", str(tmp_path / "none")]).exit_code == 1


def test_the_config_has_all_calls_that_its_packed_ones_stand_for() -> None:
    made = make_plan(load_spec(CONFIGS / "packed.yaml"), 90)
    cases = {t.case.with_pass("fwd") for t in made.first}
    batches = [c for c in cases if c.varlen]
    assert len(batches) == 8 and all(c in cases for b in batches for _, _, c in fixed_cases(b))
