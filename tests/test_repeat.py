"""How repeatable winners are: judged on runs whose picks and truth are known, and the whole job with made-up runs."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sweeps import repeat_runs
from sweeps.finals import final_sampling
from sweeps.repeat import TRUTH, is_complete, judge, markdown, truth_round, truth_spec, write_repeat
from sweeps.repeat_runs import RepeatError, begin, go_on, times_of
from sweeps.sampling import FinalSampling
from sweeps.select import Selection, select
from sweeps.specfile import load_spec, parse_spec
from tests import synthetic
from tests.synthetic import case, row, tile
from tests.test_verdict import A, B, C, record

FWD, DQ = case("gpt-oss", "fwd", 4096, 128), case("gpt-oss", "bwd_dq", 4096, 128)
SPEC = "name: r\ndevice: null\nshapes: {model: gpt-oss, window: 128, seqlen: 4096}\n"


def run_of(*times: tuple[dict[str, Any], float], c: Any = FWD) -> list[dict[str, Any]]:
    return [row(c, config=config, ms=ms) for config, ms in times]


def chosen(rows: list[dict[str, Any]], *finals: dict[str, Any]) -> Selection:
    return select(rows, finals)


CLEAR = run_of((A, 1.0), (B, 1.05))
OTHER = run_of((A, 1.05), (B, 1.0))


def test_equal_winners_need_no_truth() -> None:
    found = judge([chosen(CLEAR)] * 3, [], [[]] * 3)
    (picks,) = found.cases
    assert picks.equal and picks.tied and picks.regrets == (0.0, 0.0, 0.0) and picks.truth is None
    assert truth_round([chosen(CLEAR)] * 3) == []


def test_regret_is_the_picks_time_over_the_true_bests() -> None:
    selections = [chosen(CLEAR), chosen(OTHER), chosen(CLEAR)]
    (final,) = truth_round(selections)
    assert sorted(json.dumps(t.config) for t in final.entrants) == sorted(json.dumps(x) for x in (A, B))
    found = judge(selections, [record(FWD, [(A, 1.02), (B, 1.0)])], [[]] * 3)
    (picks,) = found.cases
    assert not picks.equal and not picks.tied
    assert picks.regrets[1] == 0.0 and picks.regrets[0] == pytest.approx(0.02, abs=0.006) == picks.regrets[2]
    assert found.summary()["regret_worst"] == picks.regrets[0] == found.summary()["regret_median"]
    assert found.summary()["equal"] == found.summary()["equal_or_tied"] == 0.0
    assert "**differ**" in markdown(found)


def test_winners_that_both_runs_held_for_tied_are_tied() -> None:
    finals = [record(FWD, [(A, 1.0), (B, 1.0)])]
    pair = [run_of((A, 1.0), (B, 1.0)), run_of((A, 1.0), (B, 1.0), (C, 2.0))]
    neighbour = [row(case("gpt-oss", "fwd", 1024, 128), config=x, ms=ms) for x, ms in ((A, 1.2), (B, 1.0))]
    selections = [chosen(pair[0], *finals), chosen([*pair[1], *neighbour], *finals)]
    found = judge(selections, [], [[], []])
    picks = next(p for p in found.cases if p.case == FWD)
    assert [w.config for w in picks.winners if w] == [A, B] and picks.tied and not picks.equal
    assert picks.regrets == (None, None)  # no final told
    # only one of the runs held them for tied
    once = judge([selections[0], chosen(OTHER)], [], [[], []])
    assert not once.cases[0].tied


def test_winners_between_which_the_truth_finds_no_difference_are_tied() -> None:
    tie = record(FWD, [(A, 1.0), (B, 1.0)], noise=0.001)
    (picks,) = judge([chosen(CLEAR), chosen(OTHER)], [tie], [[], []]).cases
    assert picks.tied and not picks.equal and max(r for r in picks.regrets if r is not None) < 0.003


def test_a_run_without_the_case_agrees_with_nobody() -> None:
    (picks,) = judge([chosen(CLEAR), chosen([])], [], [[], []]).cases
    assert picks.winners[1] is None and not picks.equal and not picks.tied and picks.regrets[1] is None


def test_the_truth_holds_every_winner_and_whoever_was_close() -> None:
    crowd = [tile(m, n, s=s) for m in (16, 32, 64, 128) for n in (32, 64) for s in (2, 3)]
    everyone = chosen(run_of(*((config, 1.0) for config in crowd)))
    only_c = chosen(run_of((C, 0.9), (A, 1.5)))
    (final,) = truth_round([everyone, only_c])
    assert len(final.entrants) == 10 and C in [t.config for t in final.entrants]
    assert everyone.results[0].best is not None
    assert everyone.results[0].best.config in [t.config for t in final.entrants]
    base = final_sampling(truth_spec(parse_spec(SPEC)).timing)
    assert not base.race and base.energy_ms == 0 and base.precision == 0.001 < FinalSampling().precision


def test_the_share_of_device_time_comes_from_the_runs_last_sitting() -> None:
    sittings = [[{"gpu_busy": 0.1, "elapsed_s": 1.0}, {"gpu_busy": 0.9, "elapsed_s": 50.0, "cached_share": 1.0}], []]
    found = judge([chosen(CLEAR)] * 2, [], sittings)
    assert found.busy == (0.9, None) and found.elapsed_s == (50.0, None) and found.cached == (1.0, None)
    text = markdown(found)
    assert "run 1: 50 s, device busy 90%" in text and "run 2: unknown" in text


# ---- the whole job


class Sweeps:
    """Stands in for the processes: writes a run, or ends as it is told to."""

    def __init__(self, runs: Sequence[list[dict[str, Any]]], codes: Sequence[int] = ()) -> None:
        self.runs, self.codes = list(runs), list(codes)
        self.commands: list[list[str]] = []
        self.caches: set[str] = set()

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        self.commands.append(list(arguments))
        self.caches.add(environment["TRITON_CACHE_DIR"])
        run_dir = Path(arguments[arguments.index("--out") + 1 if "--out" in arguments else
                                 arguments.index("--resume") + 1])
        code = self.codes.pop(0) if self.codes else 0
        rows = self.runs[int(run_dir.name.split("-")[1]) - 1]
        synthetic.write_run(run_dir, rows)
        stopped = "interrupted" if code else ""
        (run_dir / "summary.json").write_text(json.dumps([{"stopped": stopped, "remaining": 0, "gpu_busy": 0.8}]))
        return code


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    held: list[Any] = []

    def run(spec: Any, run_dir: Path, phases: Any) -> Any:
        finals = phases[0]([])
        held.append(([f.id for f in finals], spec.timing.finals))
        run_dir.mkdir(parents=True)
        lines = [json.dumps(record(FWD, [(A, 1.02), (B, 1.0)]))] if finals else []
        (run_dir / "finals.jsonl").write_text("".join(line + "\n" for line in lines))
        (run_dir / "summary.json").write_text(json.dumps([{"stopped": "", "remaining": 0}]))
        return type("Done", (), {"stopped": ""})()

    monkeypatch.setattr(repeat_runs, "run", run)
    return held


def test_runs_are_made_once_each_and_then_judged(tmp_path: Path, truth: list[Any]) -> None:
    folder = tmp_path / "repeat"
    begin(folder, parse_spec(SPEC), 3)
    assert times_of(folder) == 3 and load_spec(folder / "spec.yaml") == parse_spec(SPEC)
    sweeps = Sweeps([CLEAR, OTHER, CLEAR])
    found = go_on(folder, say=lambda text: None, sweep=sweeps)
    assert [c[-1].rsplit("/", 1)[1] for c in sweeps.commands] == ["run-1", "run-2", "run-3"]
    assert sweeps.caches == {str(folder / "cache")} and not (folder / "cache").exists()
    assert len(truth) == 1 and truth[0][1] == TRUTH and truth[0][0][0].startswith(FWD.id)
    assert found.busy == (0.8, 0.8, 0.8)
    saved = json.loads((folder / "repeat.json").read_text())
    assert saved == found.summary() and saved["runs"] == 3
    with (folder / "repeat.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert json.loads(line["run2"]) == B and float(line["run2_regret"]) == 0.0 and float(line["run1_regret"]) > 0.01
    # once more: nothing is left to do
    again = Sweeps([])
    assert go_on(folder, say=lambda text: None, sweep=again).summary() == saved and again.commands == []
    assert write_repeat(folder, 3).summary() == saved


def test_an_interrupted_repetition_goes_on_where_it_was(tmp_path: Path, truth: list[Any]) -> None:
    folder = tmp_path / "repeat"
    begin(folder, parse_spec(SPEC), 2)
    first = Sweeps([CLEAR, CLEAR], codes=[0, 130])
    with pytest.raises(RepeatError, match="run 2 of 2 ended with exit status 130") as caught:
        go_on(folder, say=lambda text: None, sweep=first)
    assert caught.value.code == 130 and is_complete(folder / "run-1") and not is_complete(folder / "run-2")
    second = Sweeps([CLEAR, CLEAR])
    go_on(folder, say=lambda text: None, sweep=second)
    assert second.commands == [["-m", "sweeps", "run", "--resume", str(folder / "run-2")]]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--times: expected at least 2, got 1"):
        begin(tmp_path / "x", parse_spec(SPEC), 1)
    begin(tmp_path / "x", parse_spec(SPEC), 2)
    with pytest.raises(ValueError, match="holds a repetition already"):
        begin(tmp_path / "x", parse_spec(SPEC), 2)
    with pytest.raises(ValueError, match="--resume: expected the folder of a repetition"):
        times_of(tmp_path)


def test_the_config_made_for_it_has_rivals_enough() -> None:
    from sweeps.plan import make_plan

    plan = make_plan(load_spec(Path(__file__).parent.parent / "configs" / "repeat.yaml"), 90)
    assert not any(trial.rejected for trial in plan.first)
    sizes = Counter((trial.impl, trial.case.id) for trial in plan.first)
    portable, hopper = ([n for (of, _), n in sizes.items() if of == impl] for impl in ("triton", "hopper"))
    assert len(portable) == 12 and min(portable) >= 14 and len(plan.wholes) == 4
    assert len(hopper) == 8 and min(hopper) >= 4    # whole backwards, not parts
    # 180 rows took 18 to 28 s on an H200
    assert sum(trial.runs for trial in plan.first) <= 540
