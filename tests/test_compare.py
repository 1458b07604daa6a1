"""The comparison of two runs: verdicts from intervals, clocks and unchanged peers; what is refused; exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweeps.cli import app
from sweeps.compare import CompareError, Control, FailOn, compare, control_range, ratio_interval, verdict_of
from sweeps.compare_text import comparison_markdown, comparison_table, control_line, headline
from sweeps.select import Measured
from tests import synthetic
from tests.synthetic import ENV, case, row, tile

FWD = case("gpt-oss", "fwd", 4096, 128)
BWD = case("gpt-oss", "fwd", 8192, 128)


def run(path: Path, rows, **env) -> Path:
    return synthetic.write_run(path, rows, ENV | env)


def ours(ms: float, c=FWD, noise: float = 0.002, **more):
    return row(c, config=tile(64, 32), ms=ms, noise=noise, sm_clock_mhz=more.pop("clock", 1980.0), **more)


def verdict(tmp_path: Path, old_rows, new_rows, **more):
    (change,) = compare(run(tmp_path / "old", old_rows), run(tmp_path / "new", new_rows), **more).changes
    return change


def test_the_interval_of_a_ratio_adds_errors_in_quadrature():
    old = Measured("triton", {}, 1.0, 0.97, 1.03, {})
    new = Measured("triton", {}, 2.0, 1.92, 2.08, {})
    low, high = ratio_interval(old, new)
    assert low == pytest.approx(2 * 2.718281828 ** -((0.040822**2 + 0.029559**2) ** 0.5), rel=1e-4)
    assert high == pytest.approx(2 * 2.718281828 ** ((0.039221**2 + 0.030459**2) ** 0.5), rel=1e-4)
    assert 1.92 / 1.03 < low and high < 2.08 / 0.97        # narrower than the bounds of both intervals


@pytest.mark.parametrize("low,high,expected", [
    (1.02, 1.03, "SLOWER"), (0.95, 0.98, "FASTER"), (0.995, 1.005, "SAME"), (1.005, 1.03, "UNSURE"),
    (0.98, 1.02, "UNSURE"), (1.0, 1.0, "SAME")])
def test_a_verdict_needs_the_whole_interval(low, high, expected):
    assert verdict_of(low, high, 0.01) == expected


@pytest.mark.parametrize("new_ms,noise,expected", [
    (0.103, 0.002, "SLOWER"), (0.097, 0.002, "FASTER"), (0.1002, 0.002, "SAME"), (0.103, 0.08, "UNSURE")])
def test_verdicts_follow_the_samples(tmp_path, new_ms, noise, expected):
    change = verdict(tmp_path, [ours(0.1)], [ours(new_ms, noise=noise)])
    assert change.verdict == expected
    assert change.change == pytest.approx(new_ms / 0.1 - 1) and change.low < change.change < change.high


def test_samples_are_needed(tmp_path):
    bare = ours(0.15)
    bare["samples_ms"] = []
    change = verdict(tmp_path, [ours(0.1)], [bare])
    assert change.verdict == "UNSURE" and change.notes == ("without samples there is no interval",)


def test_a_clock_that_explains_the_change_makes_it_unsure_and_scales_nothing(tmp_path):
    change = verdict(tmp_path, [ours(0.1)], [ours(0.11, clock=1800.0)])
    assert change.verdict == "UNSURE" and change.change == pytest.approx(0.1)
    assert change.notes == ("SM clock 1980 → 1800 MHz",)


def test_a_change_beyond_what_the_clock_explains_stays(tmp_path):
    assert verdict(tmp_path, [ours(0.1)], [ours(0.13, clock=1800.0)]).verdict == "SLOWER"


CAPPED = ["sw_power_cap"]


@pytest.mark.parametrize("new_ms,old_throttle,new_throttle,expected", [
    (0.1045, [], CAPPED, "UNSURE"), (0.1045, CAPPED, CAPPED, "UNSURE"), (0.12, [], CAPPED, "SLOWER"),
    (0.1045, CAPPED, [], "SLOWER"),     # which was held back and faster all the same
    (0.0955, CAPPED, [], "UNSURE"), (0.0955, [], CAPPED, "FASTER"), (0.085, CAPPED, CAPPED, "FASTER"),
    (0.1002, CAPPED, CAPPED, "SAME"), (0.1045, None, [], "SLOWER")])
def test_a_throttled_side_that_is_slower_makes_a_small_change_unsure(
        tmp_path, new_ms, old_throttle, new_throttle, expected):
    change = verdict(tmp_path, [ours(0.1, throttle=old_throttle)], [ours(new_ms, throttle=new_throttle)])
    assert change.verdict == expected and change.change == pytest.approx(new_ms / 0.1 - 1)
    assert change.notes == tuple(f"{when} run throttled: sw_power_cap" for when, throttle in (
        ("old", old_throttle), ("new", new_throttle)) if throttle)


def test_the_clock_warning_counts_the_cases(tmp_path):
    found = compare(run(tmp_path / "old", [ours(0.1)]), run(tmp_path / "new", [ours(0.11, clock=1800.0)]))
    assert any("in 1 of 1 comparisons; no time was scaled" in w for w in found.warnings)


def peers(factor: float, version: str = "1.0"):
    return [row(case("gpt-oss", "fwd", 1024 * n, 128), "fa3", ms=0.09 * factor * (1 + n / 100), noise=0.001,
                versions={"fa3": version}) for n in range(1, 7)]


def test_unchanged_peers_that_moved_as_much_make_it_unsure(tmp_path):
    old = run(tmp_path / "old", [ours(0.1), *peers(1.0)])
    (change,) = compare(old, run(tmp_path / "new", [ours(0.103), *peers(1.05)])).changes
    assert change.verdict == "UNSURE" and change.notes == ("unchanged peers: +0.0% to +5.0%",)
    (change,) = compare(old, run(tmp_path / "still", [ours(0.103), *peers(1.0)])).changes
    assert change.verdict == "SLOWER" and change.notes == ()
    (change,) = compare(old, run(tmp_path / "version", [ours(0.103), *peers(1.05, "2.0")])).changes
    assert change.verdict == "SLOWER"       # another version may be slower by itself
    found = compare(old, run(tmp_path / "all", [ours(0.103), *peers(1.05)]), ["all"])
    assert [c.verdict for c in found.changes] == ["UNSURE", *["SLOWER"] * 6]    # the peers themselves are said
    assert "+5.0% in the mean over 6 timings" in control_line(found)


def test_only_peers_of_about_the_same_time_are_a_control():
    near = [Control(1.0, 1.01 + i / 1000) for i in range(5)]
    assert control_range(near, 1.5) == (1.0, pytest.approx(1.014))
    assert control_range(near, 2.5) is None and control_range(near[:4], 1.0) is None


def test_other_cards_and_timing_modes_are_refused(tmp_path):
    old = run(tmp_path / "old", [ours(0.1)])
    h200 = [ours(0.1) | {"gpu": "NVIDIA H200"}]
    for name, rows, env, message in (
        ("gpu", h200, {"gpu": "NVIDIA H200"}, "GPU: NVIDIA H100 80GB HBM3 and NVIDIA H200"),
        ("sms", [ours(0.1)], {"sm_count": 114}, "SMs: 132 and 114"),
        ("mode", [ours(0.1)], {"timing_mode": "other"}, "timing mode"),
        ("memory", [ours(0.1)], {"memory_bytes": 2 * ENV["memory_bytes"]}, "two kinds of card"),
        ("cpu", [ours(0.1) | {"gpu": "cpu"}], {"gpu": "cpu"}, "interpreter"),
    ):
        with pytest.raises(CompareError, match=message):
            compare(old, run(tmp_path / name, rows, **env))


def test_other_versions_are_warned_of_and_listed(tmp_path):
    old = run(tmp_path / "old", [ours(0.1)], memory_bytes=ENV["memory_bytes"] + 2**20)
    new = run(tmp_path / "new", [ours(0.1)], driver="590.1", kernel_source="bbbbbbbbbbbb", gpu_uuid="x")
    found = compare(old, new)
    assert "another driver: 580.65.06 → 590.1" in found.warnings and any("two specimens" in w for w in found.warnings)
    assert found.differs == (("driver", "580.65.06", "590.1"), ("kernel sources", "aaaaaaaaaaaa", "bbbbbbbbbbbb"))


def test_a_case_without_a_time_any_more_is_lost_and_others_are_counted(tmp_path):
    other = case("gpt-oss", "fwd", 512)
    old = run(tmp_path / "old", [ours(0.1), ours(0.2, BWD), ours(0.3, other)])
    dead = row(BWD, config=tile(64, 32), status="crashed")
    new = run(tmp_path / "new", [ours(0.1), dead, ours(0.4, case("gpt-oss", "fwd", 256))])
    found = compare(old, new)
    assert [(x.case, x.status) for x in found.lost] == [(BWD, "crashed")]
    assert found.only_old == (other.id,) and found.only_new == (case("gpt-oss", "fwd", 256).id,)
    assert found.failures([FailOn.parse("lost")]) == [f"ours {BWD.id}: crashed, it was timed before"]


def test_the_best_of_ours_is_compared_whatever_its_configuration(tmp_path):
    old = [row(FWD, config=tile(64, 32), ms=0.1), row(FWD, config=tile(64, 64), ms=0.2)]
    new = [row(FWD, config=tile(64, 32), ms=0.2), row(FWD, config=tile(64, 64), ms=0.05)]
    found = compare(run(tmp_path / "old", old), run(tmp_path / "new", new))
    assert found.changes[0].verdict == "FASTER" and found.changes[0].change == pytest.approx(-0.5)
    assert "64x32 w4 s3 → 64x64 w4 s3" in comparison_markdown(found)


@pytest.mark.parametrize("text,kind,threshold", [("slower:2%", "slower", 0.02), ("slower", "slower", 0.0),
                                                 ("slower:0.5%", "slower", 0.005), ("lost", "lost", 0.0)])
def test_rules(text, kind, threshold):
    assert FailOn.parse(text) == FailOn(kind, threshold)


def test_a_bad_rule_and_an_unknown_implementation_say_what_was_expected(tmp_path):
    with pytest.raises(CompareError, match="--fail-on: expected slower:PERCENT%"):
        FailOn.parse("faster:2%")
    one = run(tmp_path / "old", [ours(0.1)])
    with pytest.raises(CompareError, match="--impl: expected ours, peers, all or one of ours, got 'fa9'"):
        compare(one, one, ["fa9"])


def test_the_command_and_its_exit_codes(tmp_path):
    old = run(tmp_path / "old", [ours(0.1), ours(0.2, BWD)])
    new = run(tmp_path / "new", [ours(0.103), ours(0.2, BWD)])
    cpu = run(tmp_path / "cpu", [ours(0.1) | {"gpu": "cpu"}], gpu="cpu")
    comment = tmp_path / "comment.md"

    def call(*args):
        return CliRunner().invoke(app, ["compare", *map(str, args)])

    done = call(old, new, "--markdown", comment)
    assert done.exit_code == 0 and "1 SLOWER, 1 SAME of 2 comparisons" in done.output
    said = comment.read_text()
    assert said.startswith("### old → new\n") and "| SLOWER | ours | gpt-oss | fwd |" in said
    assert call(old, new, "--fail-on", "slower:2%").exit_code == 1
    assert "SLOWER by 3.0%" in call(old, new, "--fail-on", "slower:2%").output
    assert call(old, new, "--fail-on", "slower:5%").exit_code == 0
    assert call(new, old, "--fail-on", "slower:2%", "--fail-on", "lost").exit_code == 0
    # a rule finer than the margin of SAME moves the margin
    close = run(tmp_path / "close", [ours(0.1008, noise=0.0005), ours(0.2, BWD)])
    assert call(old, close, "--fail-on", "slower:0.2%").exit_code == 1
    for args in ((old, cpu), (old, new, "--fail-on", "quicker"), (old, new, "--impl", "fa9")):
        assert call(*args).exit_code == 2
    assert call(old, tmp_path).exit_code == 1


def test_what_is_said_fits_eighty_columns(tmp_path):
    from rich.console import Console

    found = compare(run(tmp_path / "old", [ours(0.1)]), run(tmp_path / "new", [ours(0.103)]))
    assert headline(found) == "1 SLOWER of 1 comparisons"
    console = Console(width=80, record=True)
    console.print(comparison_table(found))
    text = console.export_text()
    assert "SLOWER" in text and "+3.0%" in text and max(map(len, text.splitlines())) <= 80
