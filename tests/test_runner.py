"""Whatever ends a trial ends only that trial, and becomes a row."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps import runner
from sweeps.cases import Case
from sweeps.columns import COLUMNS, STATUSES
from sweeps.environment import environment
from sweeps.plan import Trial
from sweeps.registry import built_in, load
from sweeps.spec import SweepSpec
from sweeps.store import StoreFull, read_environment, read_rows
from sweeps.supervisor import Supervisor
from tests.fakes import is_running

CASE = Case(pass_="fwd", dtype="bfloat16", batch=1, seqlen_q=12, seqlen_k=12, heads_q=2, heads_kv=1, head_dim=16,
            head_dim_v=16, window=4)
ROOT = Path(__file__).resolve().parent.parent
# How trials end, by their config's ``n`` (the implementation where there is none): what two tests below require of
# rows that were really written.
IN_THE_WORKER = {
    0: "ok", 1: "runtime_error", 2: "oom", 3: "out_of_resources", 4: "rejected", 5: "incorrect", 6: "incorrect",
    7: "incorrect", 8: "ok", 9: "crashed", 10: "timeout", 11: "crashed", 12: "ok", "gone": "unavailable",
    "missing": "unavailable", "varlen": "unsupported"}
AHEAD = {0: "compile_error", 1: "compile_error", 2: "timeout", 3: "out_of_resources", 4: "ok", 5: "duplicate", 6: "ok"}


def make_spec(options: Mapping[str, Any] | None = None, **timing: float) -> SweepSpec:
    fake = {"use": "tests.fakes:make", "options": dict(options or {})}
    gone = {"use": "tests.fakes:make", "options": {"gone": "package nowhere is not installed"}}
    return SweepSpec.model_validate({
        "name": "test", "implementations": {"fake": fake, "gone": gone, "missing": {"use": "tests.nowhere:make"}},
        "shapes": {"heads": [[2, 1]], "head_dim": [16], "seqlen": [12]},
        "timing": {"wall_ms": 1.0, **timing}})


def trials(spec: SweepSpec, *configs: Mapping[str, Any], impl: str = "fake", case: Case = CASE) -> list[Trial]:
    return [Trial(case, impl, config, spec.implementations[impl].all_options()) for config in configs]


def go(spec: SweepSpec, run_dir: Path, *phases: Sequence[Trial],
       **options: Any) -> tuple[runner.RunSummary, dict[Any, dict[str, Any]]]:
    """Runs it; the summary, and the rows by their config's ``n`` (impl where there is none)."""
    summary = runner.run(spec, run_dir, phases=[lambda rows, phase=p: phase for p in phases], **options)
    return summary, {row["config"].get("n", row["impl"]): row for row in read_rows(run_dir)}


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the runner believe in a Hopper GPU, so that it compiles ahead; the worker is not deceived."""
    env = environment() | {"arch": 90, "shared_bytes_per_block": 232448, "cpu_count": 3}
    monkeypatch.setattr(runner, "environment", lambda: dict(env))


def test_every_way_a_trial_can_end_in_the_worker_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "prepared"
    spec = make_spec({"log": str(log)}, compile_timeout_s=5.0)
    ways = ["ok", "runtime_error", "oom", "out_of_resources", "rejected", "incorrect", "stale", "drifts", "chatter",
            "sigkill", "hang", "abort", "ok"]
    planned = trials(spec, *({"do": way, "n": n} for n, way in enumerate(ways)))
    planned[4] = Trial(CASE, "fake", {"do": "rejected", "n": 4}, planned[4].options, rejected="the tile does not fit")
    planned += trials(spec, {}, impl="gone") + trials(spec, {}, impl="missing")
    planned += trials(spec, {"n": "varlen"}, case=Case(**{**CASE.__dict__, "varlen": "x", "seqlens": (12,)}))
    events: list[dict[str, Any]] = []
    summary, rows = go(spec, tmp_path / "run", planned, on_event=events.append)

    assert {n: row["status"] for n, row in rows.items()} == IN_THE_WORKER
    for n, words in {1: "device-side assert", 2: "memory", 3: "shared memory", 4: "does not fit", 5: "o",
                     6: "NaN", 7: "after timing", 9: "SIGKILL", 10: "run: longer than its limit of 5 s",
                     11: "last words", "gone": "package nowhere", "missing": "nowhere", "varlen": "no varlen"}.items():
        assert words in rows[n]["message"], rows[n]["message"]
    assert [int(n) for n in log.read_text().split()] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]  # each once, in order

    good = rows[0]
    assert set(COLUMNS) <= set(good) and good["latency_ms"] > 0 and good["wall_ms"] > 0
    assert good["samples"] == len(good["samples_ms"]) >= 1 and good["applies_sink"] is True and good["registers"] == 80
    assert 0 <= good["rel_err_o"] < 0.01 and good["rel_err_dq"] is None
    assert good["tflops"] == pytest.approx(2 * 32 * 2 * (1 + 2 + 3 + 4 * 9) / good["latency_ms"] / 1e9)
    assert ("times mean nothing" in good["note"]) == (good["gpu"] == "cpu")
    assert Case.from_dict(good["case_fields"]) == CASE
    assert rows[5]["rel_err_o"] == pytest.approx(0.25, abs=0.02) and rows[5]["latency_ms"] is None
    assert rows[7]["latency_ms"] > 0  # measured, shown, and not eligible

    assert summary.counts == Counter(IN_THE_WORKER.values())
    assert (summary.new_rows, summary.remaining, summary.stopped) == (16, 0, "")
    assert 0 < summary.gpu_busy < 1 and set(summary.seconds) >= {"starting", "run", "measure"}
    done = [e for e in events if e["event"] == "row"]
    assert len(done) == 16 and done[-1]["done"] == done[-1]["total"] == 16
    with (tmp_path / "run" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["status"] for row in table] == [row["status"] for row in read_rows(tmp_path / "run")]
    assert read_environment(tmp_path / "run")["gpu"] == good["gpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_broken_cuda_context_costs_one_trial(tmp_path: Path) -> None:
    spec = make_spec()
    ways = ["ok", "device_assert", "ok", "oom", "ok"]
    _, rows = go(spec, tmp_path / "run", trials(spec, *({"do": way, "n": n} for n, way in enumerate(ways))))
    assert [rows[n]["status"] for n in range(5)] == ["ok", "runtime_error", "ok", "oom", "ok"]


def test_compiling_ahead_settles_what_cannot_run_before_the_worker_sees_it(tmp_path: Path, compiling: None) -> None:
    log = tmp_path / "prepared"
    spec = make_spec({"log": str(log)}, compile_timeout_s=5.0)
    configs = [{"do": "compile_error"}, {"do": "compile_abort"}, {"do": "compile_hang"},
               {"binary": "aa", "shared_bytes": 232449}, {"binary": "bb"}, {"binary": "bb"}, {"binary": "cc"}]
    planned = trials(spec, *(config | {"n": n} for n, config in enumerate(configs)))
    summary, rows = go(spec, tmp_path / "run", planned, compilers=2)
    assert {n: row["status"] for n, row in rows.items()} == AHEAD
    for n, words in {0: "PassManager", 1: "SIGABRT", 2: "compile: longer", 3: "needs 232449 bytes, a block has 232448",
                     5: rows[4]["trial"]}.items():
        assert words in rows[n]["message"], rows[n]["message"]
    assert sorted(log.read_text().split()) == ["4", "6"]
    assert rows[4]["registers"] == 80 and rows[4]["spills"] == 0  # the worker's number wins where it has one
    assert rows[4]["compile_s"] > 0 and rows[4]["binary"] == "bb" and rows[5]["duplicate_of"] == rows[4]["trial"]

    # A later run of the directory knows the machine code of the earlier ones.
    _, rows = go(spec, tmp_path / "run", trials(spec, {"binary": "cc", "n": 7}))
    assert rows[7]["status"] == "duplicate" and rows[6]["trial"] in rows[7]["message"]


def test_compile_only_builds_and_never_runs(tmp_path: Path) -> None:
    log = tmp_path / "prepared"
    spec = make_spec({"log": str(log)})
    _, rows = go(spec, tmp_path / "run", trials(spec, {"binary": "aa", "n": 0}, {"do": "compile_error", "n": 1}),
                 compile_only=True, compilers=1)
    assert (rows[0]["status"], rows[0]["registers"], rows[0]["latency_ms"]) == ("ok", 64, None)
    assert "compiled only" in rows[0]["note"] and rows[1]["status"] == "compile_error" and not log.exists()


def test_a_second_phase_is_made_from_the_rows_of_the_first_and_done_rows_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "prepared"
    spec = make_spec({"log": str(log)})
    seen: list[list[int]] = []

    def second(rows: list[dict[str, Any]]) -> list[Trial]:
        seen.append([row["config"]["n"] for row in rows])
        return trials(spec, {"n": 2})

    phases = [lambda rows: trials(spec, {"n": 0}, {"do": "runtime_error", "n": 1}, {"n": 0}), second]
    first = runner.run(spec, tmp_path / "run", phases=phases)
    again = runner.run(spec, tmp_path / "run", phases=phases)
    assert seen == [[0, 1], [0, 1, 2]] and (first.new_rows, again.new_rows) == (3, 0)
    retried = runner.run(spec, tmp_path / "run", phases=phases, retry=("runtime_error",))
    assert retried.new_rows == 1 and log.read_text().split() == ["0", "1", "2", "1"]
    assert len(read_rows(tmp_path / "run")) == 3
    changed = make_spec({"log": str(log), "version": 2})  # another version of the kernel is another number
    assert runner.run(changed, tmp_path / "run", phases=[lambda rows: trials(changed, {"n": 0})]).new_rows == 1


def test_the_time_limit_stops_between_trials(tmp_path: Path) -> None:
    spec = make_spec()
    planned = trials(spec, {"n": 0}, {"n": 1})
    summary, rows = go(spec, tmp_path / "run", planned, planned, limit_minutes=0.0)
    assert (summary.stopped, summary.remaining, rows) == ("limit", 2, {})
    assert (tmp_path / "run" / "results.csv").read_text().splitlines() == [",".join(COLUMNS)]


def test_a_full_disk_stops_the_run_with_the_log_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, rejected = os.write, {"rejected": "it does not fit"}
    spec = make_spec()
    planned = [Trial(CASE, "fake", {"n": n}, spec.implementations["fake"].all_options(), **rejected) for n in range(3)]

    def full(fd: int, data: bytes) -> int:
        if b'"n":1' in data:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreFull):
        go(spec, tmp_path / "run", planned)
    monkeypatch.undo()
    assert [row["config"]["n"] for row in read_rows(tmp_path / "run")] == [0]
    summary, rows = go(spec, tmp_path / "run", planned)
    assert set(rows) == {0, 1, 2} and summary.new_rows == 2


SCRIPT = """
import json, sys
from pathlib import Path
from sweeps import runner
from tests.test_runner import make_spec, trials
run_dir, log, configs = sys.argv[1:]
spec = make_spec({"log": log})
summary = runner.run(spec, Path(run_dir), phases=[lambda rows: trials(spec, *json.loads(configs))])
print(json.dumps([summary.stopped, summary.remaining, summary.new_rows]))
"""


PATIENCE_S = 300.0  # for a process to get somewhere; none takes so long unless it hangs


class Parent:
    """A run in a process of its own. Leaving the ``with`` ends it."""

    def __init__(self, run_dir: Path, log: Path, configs: Sequence[Mapping[str, Any]], script: str = SCRIPT) -> None:
        self.log, self._said = log, run_dir.with_name("stderr")
        # Extended, not replaced: what is installed may be found through it.
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(run_dir), str(log), json.dumps(configs)], text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=self._said.open("w"), env={**os.environ, "PYTHONPATH": paths})

    def wait_for(self, line: str) -> None:
        """Until a trial is being prepared."""
        self.wait_until(lambda: self.log.exists() and line in self.log.read_text().split(), f"trial {line}")

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not done():
            ended = self.process.poll()
            if time.monotonic() > end or (ended is not None and not done()):
                raise AssertionError(f"{what} never came (exit status {ended}): {self._said.read_text()[-2000:]}")
            time.sleep(0.02)

    def result(self) -> Any:
        """What the script printed last."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, self._said.read_text()[-2000:]
        return json.loads(out.splitlines()[-1])

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_parent_killed_by_force_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "prepared"
    slow = [{"n": 0}, {"n": 1}, {"n": 2, "do": "slow_once"}, {"n": 3}]
    with Parent(run_dir, log, slow) as parent:
        parent.wait_for("2")
    worker = int(log.with_suffix(".pid").read_text())
    end = time.monotonic() + PATIENCE_S
    while is_running(worker) and time.monotonic() < end:  # it must not hold the GPU when nobody wants its work
        time.sleep(0.02)
    assert not is_running(worker)
    assert [row["config"]["n"] for row in read_rows(run_dir)] == [0, 1]
    spec = make_spec({"log": str(log)})
    summary, rows = go(spec, run_dir, trials(spec, *slow))
    assert {n: row["status"] for n, row in rows.items()} == dict.fromkeys(range(4), "ok") and summary.new_rows == 2
    assert log.read_text().split() == ["0", "1", "2", "2", "3"]  # only the one that was running is done again
    assert len((run_dir / "trials.jsonl").read_text().splitlines()) == 4


def test_the_next_trial_begins_before_the_row_of_the_last_is_waited_for(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is written first, so that a parent that is killed loses one trial at most."""
    spec, said = make_spec(), []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (said.append("sync"), sync(fd))[1])

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "trial" and event["stage"] == "import":
            rows = (tmp_path / "trials.jsonl").read_text().splitlines()
            said.append(f"begin after {len(rows)} rows")
        elif event["event"] == "row":
            said.append(f"row {event['row']['config']['n']}")

    runner.run(spec, tmp_path, phases=[lambda rows: trials(spec, {"n": 0}, {"n": 1})], on_event=tell)
    begun = said.index("begin after 1 rows")
    assert said.index("begin after 0 rows") < begun < said.index("row 0") < said.index("row 1")
    assert "sync" in said[begun:said.index("row 0")]


def test_a_trial_that_ended_two_runs_is_not_tried_a_third_time(tmp_path: Path) -> None:
    spec = make_spec()
    _, rows = go(spec, tmp_path / "run", trials(spec, {"n": 0}))
    key = rows[0]["key"]
    (tmp_path / "run" / "trials.jsonl").unlink()
    record = json.dumps({"key": key, "trial": "t"}) + "\n"
    (tmp_path / "run" / "started.jsonl").write_text(2 * record)
    _, rows = go(spec, tmp_path / "run", trials(spec, {"n": 0}))
    assert rows[0]["status"] == "crashed" and "twice" in rows[0]["message"]


def test_ctrl_c_finishes_the_running_trial_and_writes_the_tables(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "prepared"
    with Parent(run_dir, log, [{"n": 0}, {"n": 1, "do": "sleep", "seconds": 0.3}, {"n": 2}, {"n": 3}]) as parent:
        parent.wait_for("1")
        parent.process.send_signal(signal.SIGINT)
        assert parent.result() == ["interrupted", 2, 2]
    with (run_dir / "results.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["ok", "ok"]


def test_a_worker_that_never_comes_up_ends_the_run_with_its_last_words() -> None:
    supervisor = Supervisor(lambda stage: 60.0, lambda stage: None, lambda note: None, module="tests.nowhere")
    with pytest.raises(runner.RunError, match="no worker can be started.*tests.nowhere"):
        while not supervisor.idle:
            supervisor.poll()
    supervisor.close()


def test_implementations_are_found_by_name_and_by_dotted_path() -> None:
    assert load("triton").name == "triton" and load("eager").name == "eager"
    assert load("tests.fakes:make", {"version": 3}).versions() == {"fake": "3"}
    assert load("sweeps.ours:TRITON") is load("triton")
    assert "common" not in built_in() and built_in()["eager"] == "sweeps.baselines.eager:make"


@pytest.mark.parametrize(("name", "options", "error", "says"), [
    ("tritom", {}, ValueError, "did you mean 'triton'"),
    ("tests.fakes", {}, ValueError, "dotted path package.module:NAME"),
    ("tests.fakes:NOBODY", {}, ImportError, "has no 'NOBODY'"),
    ("tests.nowhere:make", {}, ImportError, "tests.nowhere"),
    ("tests.fakes:HANG_S", {}, TypeError, "without unavailable"),
    ("triton", {"block": 64}, ValueError, "it takes no options, got {'block': 64}"),
])
def test_what_is_no_implementation_is_named(
        name: str, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says.replace("{", r"\{")):
        load(name, options)


def test_every_status_is_one_that_the_two_tests_of_endings_see() -> None:
    assert {*IN_THE_WORKER.values(), *AHEAD.values()} == set(STATUSES)
