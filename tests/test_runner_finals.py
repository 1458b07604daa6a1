"""Finals as jobs of the runner: one record each, whatever happens to an entrant or to the worker."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from sweeps import runner
from sweeps.finals import Final
from sweeps.plan import Trial
from sweeps.spec import SweepSpec
from sweeps.store import read_finals, read_rows, read_sittings
from tests.test_runner import CASE, Parent, make_spec, trials


def final(spec: SweepSpec, *configs: dict[str, Any]) -> Final:
    return Final(CASE, tuple(trials(spec, *configs)))


def go(spec: SweepSpec, run_dir: Path, *phases: list[Trial | Final], **options: Any) -> runner.RunSummary:
    return runner.run(spec, run_dir, phases=[lambda rows, phase=p: phase for p in phases], **options)


def test_a_final_is_one_record_and_is_not_run_again(tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "run"
    spec = make_spec({"log": str(log)})
    planned = trials(spec, {"n": 0}, {"n": 1})
    events: list[dict[str, Any]] = []
    summary = go(spec, run_dir, planned, [final(spec, {"n": 0}, {"n": 1})], on_event=events.append)
    assert (summary.new_rows, summary.new_finals, summary.remaining) == (2, 1, 0)
    (record,) = read_finals(run_dir)
    rows = {row["config"]["n"]: row for row in read_rows(run_dir)}
    assert record["case"] == CASE.id and record["status"] == "ok" and record["environment"] == rows[0]["environment"]
    for n, entrant in enumerate(record["entrants"]):
        assert (entrant["trial"], entrant["key"]) == (rows[n]["trial"], rows[n]["key"])
        assert entrant["config"] == {"n": n} and entrant["impl"] == "fake" and entrant["status"] == "ok"
        assert entrant["latency_ms"] > 0 and entrant["samples_ms"] and 0 <= entrant["rel_err_o"] < 0.01
    assert record["stop_reason"] and record["overlapped"] == 0.0 and record["seconds"]["measure"] > 0
    lengths = [len(entrant["samples_ms"]) for entrant in record["entrants"]]
    assert record["blocks"] == max(lengths)
    assert lengths[0] == lengths[1] or record["stop_reason"] == "winner"  # which is sampled on alone
    said = [e for e in events if e["event"] in ("phase", "final")]
    assert [e["event"] for e in said] == ["phase", "phase", "final"] and said[1]["finals"] and not said[0]["finals"]
    assert (said[2]["done"], said[2]["total"]) == (1, 1) and said[2]["record"] == record
    assert read_sittings(run_dir)[0]["new_finals"] == 1

    again = go(spec, run_dir, planned, [final(spec, {"n": 1}, {"n": 0})])  # their order does not make it another final
    assert (again.new_rows, again.new_finals) == (0, 0) and len(read_finals(run_dir)) == 1
    other = go(spec, run_dir, [final(spec, {"n": 0})])
    # each was prepared for its row, and for the final on every placement of the inputs, of which the CPU has one
    assert other.new_finals == 1 and log.read_text().split() == ["0", "1"] * (1 + record["placements"]) + ["0"]


def test_an_entrant_that_fails_is_out_and_the_others_go_on(tmp_path: Path) -> None:
    spec = make_spec()
    ways = ["ok", "incorrect", "oom", "runtime_error", "out_of_resources", "drifts", "ok"]
    go(spec, tmp_path / "run", [final(spec, *({"do": way, "n": n} for n, way in enumerate(ways)))])
    (record,) = read_finals(tmp_path / "run")
    assert record["status"] == "ok"
    assert [e["status"] for e in record["entrants"]] == [
        "ok", "incorrect", "oom", "runtime_error", "out_of_resources", "incorrect", "ok"]
    messages = [e["message"] for e in record["entrants"]]
    assert messages[0] == messages[6] == "" and "o:" in messages[1] and "prepare: " in messages[4]
    assert "device-side assert" in messages[3] and messages[5].startswith("after timing: ")
    assert [bool(e.get("samples_ms")) for e in record["entrants"]] == [True, False, False, False, False, True, True]


def test_a_final_without_anybody_left_says_why(tmp_path: Path) -> None:
    spec = make_spec()
    go(spec, tmp_path / "run", [final(spec, {"do": "incorrect", "n": 0}, {"do": "runtime_error", "n": 1})])
    (record,) = read_finals(tmp_path / "run")
    assert record["status"] == "incorrect" and "o" in record["message"]
    assert [e["status"] for e in record["entrants"]] == ["incorrect", "runtime_error"]


@pytest.mark.parametrize(("way", "status", "says"), [("sigkill", "crashed", "SIGKILL"), ("hang", "timeout", "limit")])
def test_a_worker_that_dies_costs_its_final_only(tmp_path: Path, way: str, status: str, says: str) -> None:
    spec = make_spec(compile_timeout_s=10.0)
    finals = [final(spec, {"n": 0}), final(spec, {"n": 1}, {"n": 2, "do": way}), final(spec, {"n": 3})]
    go(spec, tmp_path / "run", finals)
    records = read_finals(tmp_path / "run")
    assert [record["status"] for record in records] == ["ok", status, "ok"]
    assert says in records[1]["message"] and [e["status"] for e in records[1]["entrants"]] == [status, status]
    assert go(spec, tmp_path / "run", finals).new_finals == 0  # not tried again ...
    assert go(spec, tmp_path / "run", finals, retry=(status,)).new_finals == 1  # ... unless asked
    assert len(read_finals(tmp_path / "run")) == 3


def test_the_time_limit_holds_for_finals(tmp_path: Path) -> None:
    spec = make_spec()
    summary = go(spec, tmp_path / "run", [final(spec, {"n": 0}), final(spec, {"n": 1})], limit_minutes=0.0)
    assert (summary.stopped, summary.remaining, read_finals(tmp_path / "run")) == ("limit", 2, [])


SCRIPT = """
import json, sys
from pathlib import Path
from sweeps import runner
from sweeps.finals import Final
from tests.test_runner import CASE, make_spec, trials
run_dir, log, configs = sys.argv[1:]
spec = make_spec({"log": log})
phase = [Final(CASE, (trial,)) for trial in trials(spec, *json.loads(configs))]
summary = runner.run(spec, Path(run_dir), phases=[lambda rows: phase])
print(json.dumps([summary.stopped, summary.remaining, summary.new_finals]))
"""


def test_ctrl_c_finishes_the_running_final(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "prepared"
    slow = {"n": 1, "do": "sleep", "seconds": 0.3}
    with Parent(run_dir, log, [{"n": 0}, slow, {"n": 2}], script=SCRIPT) as parent:
        parent.wait_for("1")
        parent.process.send_signal(signal.SIGINT)
        assert parent.result() == ["interrupted", 1, 2]
    assert [r["entrants"][0]["config"]["n"] for r in read_finals(run_dir)] == [0, 1]


def test_a_final_that_ended_two_runs_is_not_tried_a_third_time(tmp_path: Path) -> None:
    spec, run_dir = make_spec(), tmp_path / "run"
    go(spec, run_dir, [final(spec, {"n": 0})])
    (record,) = read_finals(run_dir)
    (run_dir / "finals.jsonl").unlink()
    (run_dir / "started.jsonl").write_text(2 * (json.dumps({"key": record["key"], "trial": record["final"]}) + "\n"))
    go(spec, run_dir, [final(spec, {"n": 0})])
    (record,) = read_finals(run_dir)
    assert record["status"] == "crashed" and "twice" in record["message"]
