"""Several workers on one device: one prepares while another times, and never do two time at once."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sweeps import runner, supervisor
from sweeps.finals import Final
from sweeps.plan import Trial
from sweeps.sampling import disturbed
from sweeps.spec import SweepSpec
from sweeps.store import read_finals, read_rows, read_sittings
from sweeps.supervisor import Outcome, RunError, Supervisor
from sweeps.workers import GPU_STAGES, Workers, _covered
from tests.test_runner import CASE, PATIENCE_S


def make_spec(**options: Mapping[str, Any]) -> SweepSpec:
    """``fake`` is ours; ``fa3_a`` and ``fa3_b`` are peers by their names."""
    return SweepSpec.model_validate({
        "name": "test", "shapes": {"heads": [[2, 1]], "head_dim": [16], "seqlen": [12]}, "timing": {"wall_ms": 1.0},
        "implementations": {name: {"use": "tests.fakes:make", "options": {"of": name, **options.get(name, {})}}
                            for name in ("fake", "fa3_a", "fa3_b")}})


def trials(spec: SweepSpec, impl: str, *configs: Mapping[str, Any]) -> list[Trial]:
    return [Trial(CASE, impl, config, spec.implementations[impl].all_options()) for config in configs]


def go(spec: SweepSpec, run_dir: Path, planned: Sequence[Trial], **options: Any) -> dict[Any, dict[str, Any]]:
    """Runs it; the rows by their config's ``n``."""
    runner.run(spec, run_dir, phases=[lambda rows: planned], **options)
    return {row["config"]["n"]: row for row in read_rows(run_dir)}


def test_a_peer_prepares_while_ours_is_timed_and_the_row_says_so(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "disturbed", lambda fields: False)  # a row that is taken again has nobody beside it
    meeting = {"meet": str(tmp_path)}
    spec = make_spec(fake=meeting, fa3_a=meeting)
    planned = trials(spec, "fake", {"n": 0, "do": "met"}) + trials(spec, "fa3_a", {"n": 1, "do": "meet"})
    planned += trials(spec, "fake", {"n": 2}, {"n": 3}) + trials(spec, "fa3_a", {"n": 4}, {"n": 5})
    rows = go(spec, tmp_path / "run", planned, peer_workers=1)
    assert {n: row["status"] for n, row in rows.items()} == dict.fromkeys(range(6), "ok"), rows
    assert 0 < rows[0]["overlapped"] <= rows[0]["seconds"]["measure"] + 0.01

    runs = [line.split() for line in (tmp_path / "runs").read_text().splitlines()]
    spans = sorted((float(begin), float(end), pid) for pid, begin, end in runs)
    assert len({pid for *_, pid in spans}) == 2
    assert all(end <= begin for (_, end, _), (begin, _, _) in zip(spans, spans[1:], strict=False))  # never two at once

    (sitting,) = read_sittings(tmp_path / "run")
    assert set(sitting["workers"]) == {"ours", "peers"} and sitting["seconds"]["waiting"] > 0
    assert sitting["seconds"]["measure"] == pytest.approx(
        sum(worker["measure"] for worker in sitting["workers"].values()), abs=0.01)
    busy = sum(sitting["seconds"].get(stage, 0.0) for stage in GPU_STAGES)
    assert sitting["gpu_busy"] == pytest.approx(busy / sitting["elapsed_s"], abs=0.01) and busy < sitting["elapsed_s"]


@pytest.mark.parametrize("way", ["sigkill", "hang"])
def test_whoever_dies_with_the_device_leaves_it_to_the_others(tmp_path: Path, way: str) -> None:
    spec = make_spec().model_copy(update={"timing": make_spec().timing.model_copy(update={"compile_timeout_s": 10.0})})
    planned = trials(spec, "fake", {"n": 0, "do": way}, {"n": 1}) + trials(spec, "fa3_a", {"n": 2}, {"n": 3})
    rows = go(spec, tmp_path / "run", planned, peer_workers=1)
    assert [rows[n]["status"] for n in range(4)] == ["timeout" if way == "hang" else "crashed", "ok", "ok", "ok"]


def test_memory_that_others_hold_is_no_verdict(tmp_path: Path) -> None:
    """Out of memory beside another worker: run again alone. Out of memory alone: a row."""
    log = str(tmp_path / "log")
    spec = make_spec(fake={"log": log}, fa3_a={"log": log, "other": True})
    planned = trials(spec, "fa3_a", {"n": 0}, {"n": 3})
    planned += trials(spec, "fake", {"n": 1, "do": "oom_beside"}, {"n": 2, "do": "oom"})
    rows = go(spec, tmp_path / "run", planned, peer_workers=1)
    assert [rows[n]["status"] for n in range(4)] == ["ok", "ok", "oom", "ok"], rows[1]["message"]
    begun = [json.loads(line)["trial"] for line in (tmp_path / "run" / "started.jsonl").read_text().splitlines()]
    assert {n: begun.count(row["trial"]) for n, row in rows.items()} == {0: 1, 1: 2, 2: 2, 3: 1}


def test_times_that_others_disturbed_are_taken_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    both = {"log": str(log), "meet": str(tmp_path)}
    spec = make_spec(fake=both, fa3_a=both)
    monkeypatch.setattr(runner, "disturbed", lambda fields: bool(fields.get("latency_ms")))
    planned = [*trials(spec, "fa3_a", {"n": 0}), *trials(spec, "fake", {"n": 1}, {"n": 2, "do": "runtime_error"})]
    rows = go(spec, tmp_path / "run", planned, peer_workers=1)
    assert [rows[n]["status"] for n in range(3)] == ["ok", "ok", "runtime_error"]
    assert sorted(log.read_text().split()) == ["0", "0", "1", "1", "2"]  # once more, and never a third time
    assert all("taken again alone; beside others" in rows[n]["note"] for n in (0, 1)) and not rows[2]["note"]
    processes = {line.split()[0] for line in (tmp_path / "runs").read_text().splitlines()}
    assert len(processes) == 2  # whoever is idle disturbs nobody and need not be started again


def test_a_time_is_kept_where_there_is_no_room_to_take_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disturbed, then out of memory beside idle others, then with them ended: in the end one of the times is a row."""
    log = tmp_path / "log"
    spec = make_spec(fake={"log": str(log)}, fa3_a={"log": str(log), "other": True})
    monkeypatch.setattr(runner, "disturbed", lambda fields: bool(fields.get("latency_ms")))
    planned = [*trials(spec, "fa3_a", {"n": 0}), *trials(
        spec, "fake", {"n": 1, "do": "oom_second"}, {"n": 2, "do": "oom_later"})]
    rows = go(spec, tmp_path / "run", planned, peer_workers=1)
    assert [rows[n]["status"] for n in range(3)] == ["ok", "ok", "ok"], rows
    assert sorted(log.read_text().split()) == ["0", "0", "1", "1", "1", "2", "2", "2"]
    assert "taken again alone; beside others" in rows[1]["note"]
    assert "taken again alone: run: OutOfMemoryError" in rows[2]["note"] and rows[2]["latency_ms"] > 0


def test_a_worker_that_others_keep_from_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as one is at work it is tried on; idle ones end; with nobody beside it that is the end of the run."""
    monkeypatch.setattr(supervisor, "_MAX_FAILED_STARTS", 1)
    crew = Workers(2, lambda stage: PATIENCE_S, lambda job, stage: None, lambda note: None)
    ours, at_work, at_rest = crew.lanes
    monkeypatch.setattr(ours.supervisor, "_module", "tests.nowhere")
    at_work.job = object()
    for lane in (at_work, at_rest):
        monkeypatch.setattr(lane.supervisor, "_module", "tests.asking_worker")
        assert not lane.supervisor.idle  # starts it

    def fails_to_start() -> None:
        _ = ours.supervisor.idle
        while ours.supervisor.running:
            ours.supervisor.poll()
            time.sleep(0.01)
        monkeypatch.setattr(ours.supervisor, "_not_before", 0.0)

    try:
        fails_to_start()
        assert at_work.supervisor.running and not at_rest.supervisor.running
        fails_to_start()
        assert at_work.supervisor.running
        at_work.job = None
        fails_to_start()
        assert not at_work.supervisor.running
        with pytest.raises(RunError, match="no worker can be started.*tests.nowhere"):
            fails_to_start()
    finally:
        crew.close()


def test_who_is_disturbed() -> None:
    """Samples that somebody compiled beside; the same beside nobody, or in time, are the kernel's own."""
    times = {"samples_ms": [1.0, 1.0, 3.5, 3.5, 3.4, 1.0], "latency_ms": 1.0, "overlapped": 0.1, "half_width": 1.25}
    assert disturbed(times | {"stop_reason": "time"})
    assert disturbed(times | {"stop_reason": "time", "samples_ms": [19.0, 19.5, 40.0], "latency_ms": 19.5,
                              "half_width": None})
    assert not disturbed(times | {"stop_reason": "precision"})
    assert not disturbed(times | {"stop_reason": "time", "overlapped": 0.0})
    assert not disturbed(times | {"stop_reason": "time", "half_width": 0.01})
    assert not disturbed({"status": "ok", "stop_reason": "time", "overlapped": 0.1, "latency_ms": None})


def test_a_peer_stays_with_the_worker_that_compiled_it() -> None:
    workers = Workers(2, lambda stage: 60.0, lambda job, stage: None, lambda note: None)
    ours, first, second = workers.lanes
    assert [lane.name for lane in workers.lanes] == ["ours", "peers", "peers 2"]
    assert workers.lanes_for("fake", peer=False) == [ours] and workers.lanes_for("fa3", peer=True) == [first, second]
    second.sources.add("fa3")
    assert workers.lanes_for("fa3", peer=True) == [second] and workers.lanes_for("fa4", peer=True) == [first, second]
    alone = Workers(0, lambda stage: 60.0, lambda job, stage: None, lambda note: None)
    assert alone.lanes_for("fa3", peer=True) == alone.lanes


def test_a_row_and_a_stage_that_are_read_together_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy parent reads ours first; what the peer had long been doing then is known only once it is read, too."""
    workers = Workers(1, lambda stage: 60.0, lambda job, stage: None, lambda note: None)
    ours, peer = (lane.supervisor for lane in workers.lanes)
    unread = [(2.0, 7.0)]
    read: list[tuple[float, float]] = []
    monkeypatch.setattr(ours, "poll", lambda: Outcome({"status": "ok"}, measured=(5.0, 9.0)))
    monkeypatch.setattr(peer, "poll", lambda: read.extend(unread))
    monkeypatch.setattr(peer, "preparing", lambda within: [(max(b, within[0]), min(e, within[1])) for b, e in read])
    (finished,) = workers.poll()
    assert finished.lane is workers.lanes[0] and finished.overlapped_s == 2.0


def wait_for(supervisor: Supervisor, seconds: float) -> Outcome | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if outcome := supervisor.poll():
            return outcome
        time.sleep(0.01)
    return None


def started(limits: Mapping[str, float]) -> Supervisor:
    supervisor = Supervisor(lambda stage: limits.get(stage, PATIENCE_S), lambda stage: None, lambda note: None,
                            module="tests.asking_worker")
    end = time.monotonic() + PATIENCE_S
    while not supervisor.idle and time.monotonic() < end:
        supervisor.poll()
        time.sleep(0.01)
    return supervisor


def test_waiting_for_the_device_has_no_limit_and_what_follows_has() -> None:
    limits = {"waiting": 0.1, "measure": 0.3}
    supervisor = started(limits)
    try:
        assert supervisor.submit({"hang": False})
        assert wait_for(supervisor, 1.0) is None and supervisor.asking_since is not None
        assert supervisor.time_left_s() is None and not supervisor.holding
        del limits["waiting"]
        supervisor.grant()
        assert supervisor.holding and supervisor.asking_since is None and supervisor.time_left_s() is not None
        outcome = wait_for(supervisor, PATIENCE_S)
        assert outcome is not None and outcome.fields["status"] == "ok" and not supervisor.holding
        assert outcome.measured is not None and outcome.measured[0] <= outcome.measured[1]
        assert supervisor.seconds["waiting"] > 0.1  # the limit that did not hold while it waited
        assert supervisor.submit({"hang": True})
        while supervisor.asking_since is None:
            assert wait_for(supervisor, 0.05) is None
        supervisor.grant()
        outcome = wait_for(supervisor, PATIENCE_S)
        assert outcome is not None and outcome.fields == {
            "status": "timeout", "message": "measure: longer than its limit of 0.3 s"}
        assert not supervisor.holding and not supervisor.running
    finally:
        supervisor.close()


def test_preparing_is_seen_until_the_device_is_asked_for() -> None:
    supervisor = started({})
    try:
        begin = time.monotonic()
        supervisor.submit({"hang": False, "prepare_s": 0.2})
        while supervisor.asking_since is None:
            assert wait_for(supervisor, 0.05) is None
        (span,) = supervisor.preparing((begin, time.monotonic()))
        assert span[1] - span[0] >= 0.2 and span[1] <= supervisor.asking_since
        assert supervisor.preparing((span[1], time.monotonic())) == []
        assert supervisor.preparing((span[0] + 0.05, span[0] + 0.15)) == [(span[0] + 0.05, span[0] + 0.15)]
    finally:
        supervisor.close()


def test_time_covered_by_several_is_counted_once() -> None:
    assert _covered([]) == 0.0
    assert _covered([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5)]) == 3.5
    assert _covered([(0.0, 4.0), (1.0, 2.0)]) == 4.0


def test_the_process_that_asks_is_the_one_that_is_given() -> None:
    """Two ask, in turn: the first one in time is first, and the second has to wait for its row."""
    workers = Workers(1, lambda stage: PATIENCE_S, lambda job, stage: None, lambda note: None)
    for lane in workers.lanes:
        lane.supervisor.close()
        lane.supervisor = started({})
    first, second = workers.lanes
    try:
        workers.submit(second, "b", "fa3", {"hang": False})
        assert wait_asking(second.supervisor)
        workers.submit(first, "a", "fake", {"hang": False})
        assert wait_asking(first.supervisor)
        order = []
        end = time.monotonic() + PATIENCE_S
        while len(order) < 2 and time.monotonic() < end:
            order += [finished.job for finished in workers.poll()]
            assert sum(lane.supervisor.holding for lane in workers.lanes) <= 1
            time.sleep(0.01)
        assert order == ["b", "a"] and workers.jobs == []
    finally:
        workers.close()
    assert workers.gpu_s > 0


def wait_asking(supervisor: Supervisor) -> bool:
    end = time.monotonic() + PATIENCE_S
    while supervisor.asking_since is None and time.monotonic() < end:
        assert supervisor.poll() is None
        time.sleep(0.01)
    return supervisor.asking_since is not None


def test_what_is_left_of_peers_goes_on_into_the_next_phase_and_a_final_waits_for_it(tmp_path: Path) -> None:
    """The peer prepares until ours is timed, which happens only in the second phase."""
    meeting = {"meet": str(tmp_path)}
    spec = make_spec(fake=meeting, fa3_a=meeting)
    peer = trials(spec, "fa3_a", {"n": 1, "do": "meet"}, {"n": 2, "do": "oom"})
    (final,) = [Final(CASE, tuple(trials(spec, "fake", {"n": 0})))]
    seen: list[list[Any]] = []

    def phase(*planned: Trial | Final) -> runner.Phase:
        def made(rows: list[dict[str, Any]]) -> list[Trial | Final]:
            seen.append(sorted(row["config"]["n"] for row in rows))
            return list(planned)
        return made

    events: list[dict[str, Any]] = []
    phases = [phase(*trials(spec, "fake", {"n": 0}), *peer),
              phase(*peer, *trials(spec, "fake", {"n": 3, "do": "met"})), phase(final), phase()]
    summary = runner.run(spec, tmp_path / "run", phases=phases, peer_workers=1, retry=("oom",), on_event=events.append)
    rows = {row["config"]["n"]: row["status"] for row in read_rows(tmp_path / "run")}
    assert rows == {0: "ok", 1: "ok", 2: "oom", 3: "ok"} and summary.new_rows == 4  # once, also what may be retried
    assert seen[1] == [0] and seen[3] == [0, 1, 2, 3] and summary.remaining == 0
    (record,) = read_finals(tmp_path / "run")
    assert record["status"] == "ok" and record["overlapped"] == 0.0
    ended = [e["event"] for e in events if e["event"] in ("row", "final")]
    assert ended == ["row"] * 4 + ["final"]
    for event in events:
        assert event["event"] not in ("row", "final") or event["done"] <= event["total"]
