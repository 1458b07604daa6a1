"""Runs the trials of a sweep: owns the log, feeds the compilers and the workers, outlives them all.

One loop in one process and no thread: it waits until a compiler or a worker has something to say, writes down what it
was, and hands out the next piece of work. Whatever happens to a child costs at most the trial it was on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sweeps.compile_pool import CompilePool, CompileResult, CompileTask
from sweeps.devices import find_card
from sweeps.environment import environment, fingerprint
from sweeps.failures import message, shorten
from sweeps.finals import Final, final_sampling
from sweeps.jobs import Catalogue, PendingFinal, PendingTrial, finals_among, launch_problem, outstanding, trials_among
from sweeps.placements import PLACING
from sweeps.plan import Trial
from sweeps.registry import is_peer
from sweeps.rows import make_row
from sweeps.sampling import Sampling, disturbed
from sweeps.spec import SweepSpec
from sweeps.store import Row, Store, StoreError
from sweeps.summary import RunSummary
from sweeps.supervisor import RunError
from sweeps.workers import Finished, Lane, Workers

__all__ = ["RunError", "RunSummary", "run"]

Event = dict[str, Any]
Phase = Callable[[list[Row]], Sequence[Trial | Final]]

_TICK_S = 0.5
_COMPILED_ONLY = "compiled only, not run"
_TWICE = "the whole run ended twice while this was running; it is not tried again"
_PEER_WORKERS = 2           # each computes references of its own, so more would cost the device more than they save
_CORES_FOR_BOTH = 8


def run(spec: SweepSpec, run_dir: Path, *, phases: Sequence[Phase], limit_minutes: float | None = None,
        on_event: Callable[[Event], None] | None = None, retry: Collection[str] = (), compile_only: bool = False,
        compilers: int | None = None, peer_workers: int | None = None) -> RunSummary:
    """Turns every trial into a row and every final into a record; what is already in ``run_dir`` is not done again.

    Args:
        spec: names the implementations, says how to time and whether to check.
        run_dir: a new directory, or one to resume.
        phases: each is given all rows so far and returns the trials and finals it wants, in the order they should run.
            Finals run after all trials, with nobody else on the device. A phase is made when the trials of ours are
            done; those of peers may still be running.
        limit_minutes: no trial is begun after this time; None = no limit.
        on_event: told of ``{"event": "phase", "phase", "done", "total", "finals"}`` (trials and finals of the phase;
            number from 1; whether finals are all it has), ``{"event": "trial", "trial", "stage"}``,
            ``{"event": "row", "row", "done", "total"}``, ``{"event": "final", "record", "done", "total"}`` and
            ``{"event": "note", "message"}``.
        retry: statuses whose rows are tried again, such as ("crashed", "timeout"); the later row replaces the earlier.
        compile_only: build for the spec's architecture and touch no device; the rows have resources and no times.
        compilers: CPU processes that compile ahead; default all cores but two, at least one.
        peer_workers: processes that prepare and time peers beside the one for ours; default 2 on a GPU with 8 cores or
            more, 1 with fewer, 0 (one process for all) without a GPU.

    A first Ctrl-C (or SIGTERM) finishes the running trials' rows and returns; a second one stops at once.

    Raises:
        StoreError: ``run_dir`` is in use or not a run; StoreFull when a row could not be written.
        RunError: no worker can be started.
    """
    with Store(run_dir) as store:
        runner = _Runner(spec, store, on_event or (lambda event: None), limit_minutes, frozenset(retry),
                         compile_only, compilers, peer_workers)
        with runner.stopping_on_signals():
            try:
                for number, phase in enumerate(phases, 1):
                    runner.phase(number, phase(store.rows()))
                    if runner.stopped:
                        break
                runner.drain()
            except BaseException as error:
                runner.stopped = message(error)
                for last_act in (runner.close, store.write_results_csv, runner.write_sitting):
                    with contextlib.suppress(StoreError):
                        last_act()
                raise
            runner.close()
            store.write_results_csv()
            runner.write_sitting()
        return runner.summary()


class _Runner:
    def __init__(self, spec: SweepSpec, store: Store, tell: Callable[[Event], None], limit_minutes: float | None,
                 retry: frozenset[str], compile_only: bool, compilers: int | None, peer_workers: int | None) -> None:
        self._spec, self._store, self._tell, self._retry = spec, store, tell, retry
        self._begin = time.monotonic()
        self._start = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._limit_s = None if limit_minutes is None else limit_minutes * 60
        self._compile_only = compile_only
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # its default changes with Triton's version
        # Left unset, torch.compile points it elsewhere in the worker once a peer has used it: from then on nothing
        # that the compile pool built is found.
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
        self._env = environment()
        if compile_only:
            self._env |= {"gpu": spec.device.name or "none", "arch": spec.device.compile_arch,
                          "timing_mode": "compile-only"}
        store.write_environment(self._env)
        self._fingerprint = fingerprint(self._env)
        self._card = find_card(self._env["gpu"], self._env["sm_count"]) if self._env["gpu"] != "cpu" else None
        self._shared_limit = self._env["shared_bytes_per_block"] or (self._card.smem_per_block if self._card else None)
        timing, cores = spec.timing, self._env["cpu_count"]
        self._sampling = {f.name: getattr(timing, f.name) for f in dataclasses.fields(Sampling)}
        self._pool = CompilePool(compilers or max(1, cores - 2), timing.compile_timeout_s)
        self._catalogue = Catalogue(spec, self._env)
        self._unavailable: dict[str, str] = {}
        self._prebuilt: set[str] = set()  # implementations with nothing to build ahead
        self._binaries: dict[tuple[str, str, str], str] = {}
        for row in store.rows():
            self._remember_binary(row)
        if peer_workers is None:
            peer_workers = 0 if self._env["gpu"] == "cpu" else _PEER_WORKERS if cores >= _CORES_FOR_BOTH else 1
        if not any(map(is_peer, spec.implementations)):
            peer_workers = 0
        self._workers = Workers(peer_workers, self._stage_limit_s, self._on_stage, self._note)
        self._waiting: list[PendingTrial] = []
        self._alone: list[tuple[Lane, PendingTrial | PendingFinal]] = []  # what wants the device to itself
        self._known: set[str] = set()  # keys of the phase's trials and finals
        self._written: set[str] = set()  # keys of the rows of this sitting
        self._new_rows = self._new_finals = self._done = self._cache_hits = self._cache_misses = 0
        self._notes: set[str] = set()
        self.stopped = ""

    # ---- what is to be done

    def phase(self, number: int, jobs: Sequence[Trial | Final]) -> None:
        """Makes a row of every trial, then a record of every final, unless it is told to stop before.

        Peers' trials that are left when all else is done stay for the next phase, since no phase is made from their
        rows; a final waits for them.
        """
        pending = [self._catalogue.pending(trial) for trial in trials_among(jobs)]
        finals = [self._catalogue.pending_final(final) for final in finals_among(jobs)]
        carried = {job.key for job in self._unfinished()}
        new = [p for p in outstanding(pending, self._store.rows(), self._retry) if p.key not in carried | self._written]
        left = outstanding(finals, self._store.finals(), self._retry)
        self._known = carried | {p.key for p in pending} | {f.key for f in finals}
        self._done = len(self._known) - len(carried) - len(new) - len(left)
        self._tell({"event": "phase", "phase": number, "done": self._done, "total": len(self._known),
                    "finals": bool(finals) and not pending and not carried})
        new = [p for p in new if not self._settled_unrun(p)]
        self._waiting += new
        self._alone += [(self._workers.lanes[0], f) for f in left if not self._lost_twice(f)]
        if not self._compile_only and (self._alone or any(not p.peer for p in new)):
            self._workers.start_ours()  # before a dozen compilers import Torch beside it
        self._pool.submit([CompileTask(p.key, p.use, p.trial.options, p.trial.case, p.trial.config, self._env["arch"])
                           for p in new if p.must_compile])
        self._work(lambda job: isinstance(job, PendingFinal) or not job.peer)

    def drain(self) -> None:
        """Finishes what the phases have left."""
        self._work(lambda job: True)
        for _, job in self._alone:  # of a run that is stopped: what came out beside others is better than nothing
            if isinstance(job, PendingTrial) and job.beside:
                status, text, fields = job.beside
                self._row(job, status, text, **fields)
        self._alone = [(lane, job) for lane, job in self._alone if isinstance(job, PendingFinal)]

    def _unfinished(self) -> list[PendingTrial | PendingFinal]:
        return [*self._waiting, *(job for _, job in self._alone), *self._workers.jobs]

    def _work(self, owed: Callable[[PendingTrial | PendingFinal], bool]) -> None:
        """Goes on until nothing that is owed is left, or the run is stopped and nobody is at work."""
        while any(map(owed, self._unfinished())):
            self._check_limit()
            if self.stopped and not self._workers.jobs:
                break
            if not self.stopped:
                self._assign()
            self._wait()
            # First the workers: the device is free until the next of them is told that it may go on. A row is written
            # before its worker gets the next trial, and waited for and told of after that.
            events = [event for done in self._workers.poll() if (event := self._finished(done))]
            self._check_limit()
            if events and not self.stopped:
                self._assign()
            self._store.sync()
            for event in events:
                self._tell(event)
            for result in self._pool.poll():
                self._built(result)

    def _settled_unrun(self, p: PendingTrial) -> bool:
        """Writes the row of a trial whose outcome is known without running anything."""
        found = self._catalogue.get(p)
        if isinstance(found, str):
            self._row(p, "unavailable", found)
        elif reason := p.trial.unsupported or found[0].unsupported(p.trial.case):
            self._row(p, "unsupported", shorten(reason))
        elif p.trial.rejected:
            self._row(p, "rejected", shorten(p.trial.rejected))
        elif self._store.starts_without_row(p.key) >= 2:
            self._row(p, "crashed", _TWICE)
        else:
            buildable = (self._compile_only or not p.peer) and p.source not in self._prebuilt
            p.must_compile = self._env["arch"] is not None and buildable
            return False
        return True

    def _lost_twice(self, f: PendingFinal) -> bool:
        if self._store.starts_without_row(f.key) < 2:
            return False
        self._record(f, {"status": "crashed", "message": _TWICE})
        return True

    # ---- handing out work

    def _assign(self) -> None:
        """Gives idle workers what is ready for them; what wants the device to itself comes when all else is done."""
        if self._compile_only:
            return
        for lane in self._workers.lanes:
            self._fill(lane)
        if self._alone and not self._waiting and not self._workers.jobs:
            lane, job = self._alone[0]
            if not isinstance(job, PendingTrial) or job.needs_room:
                self._workers.leave_alone(lane)  # for times who is idle is no matter, and starting takes 10 s
            if lane.supervisor.idle and self._submit(lane, job):
                self._alone.pop(0)

    def _fill(self, lane: Lane) -> None:
        """Gives an idle worker the first trial that is ready, and starts it when there is one that will be."""
        if lane.job is not None:
            return
        for p in list(self._waiting):
            if lane not in self._workers.lanes_for(p.source, p.peer):
                continue
            if not lane.supervisor.idle:
                return
            if not p.ready:
                continue
            if p.source in self._unavailable:
                self._row(p, "unavailable", self._unavailable[p.source])
            elif not self._is_duplicate(p) and not self._submit(lane, p):
                return
            self._waiting.remove(p)

    def _submit(self, lane: Lane, job: PendingTrial | PendingFinal) -> bool:
        self._store.start(job.key, job.id)
        sampling = self._sampling
        if isinstance(job, PendingFinal):
            sampling = dataclasses.asdict(job.final.sampling(final_sampling(self._spec.timing)))
        source = job.source if isinstance(job, PendingTrial) else ""
        return self._workers.submit(lane, job, source, job.request(sampling=sampling, gate=self._spec.gate.enabled))

    def _is_duplicate(self, p: PendingTrial) -> bool:
        """Writes the row of a config whose machine code another config of its case has run with already."""
        binary = p.compiled.resources.get("binary") if p.compiled else None
        first = self._binaries.get((p.trial.impl, p.trial.case.id, binary or ""))
        # The untuned default is what others are compared with, so it always has a time of its own.
        if not binary or p.trial.is_default or first is None or first == p.trial.id:
            return False
        self._row(p, "duplicate", f"compiles to the same machine code as {first}", duplicate_of=first)
        return True

    def _remember_binary(self, row: Mapping[str, Any]) -> None:
        measured_here = row.get("environment") == self._fingerprint and row["status"] != "duplicate"
        if row.get("binary") and row["config"] and measured_here:
            self._binaries.setdefault((row["impl"], row["case"], row["binary"]), row["trial"])

    def _built(self, result: CompileResult) -> None:
        """Takes in what a compiler made; a build that failed is a row."""
        p = next((p for p in self._waiting if p.key == result.id), None)
        if p is None:
            return
        p.compiled = result
        if "cache_hit" in result.resources:
            self._cache_hits += bool(result.resources["cache_hit"])
            self._cache_misses += not result.resources["cache_hit"]
        failed = ""
        if result.status == "ok":
            failed = launch_problem(result.resources, p.trial.config, self._shared_limit)
        if result.status == "ok" and not failed and not self._compile_only:
            if not result.resources:
                self._nothing_to_build(p.source)
            return
        self._waiting.remove(p)
        if failed:
            self._row(p, "out_of_resources", failed)
        elif result.status != "ok":
            self._row(p, result.status, result.message)
        elif not self._is_duplicate(p):
            self._row(p, "ok", "", note=_COMPILED_ONLY)

    def _nothing_to_build(self, source: str) -> None:
        """Lets the trials of an implementation that has nothing to build ahead go straight to the worker."""
        self._prebuilt.add(source)
        same = [p for p in self._waiting if p.source == source]
        self._pool.withdraw({p.key for p in same})
        for p in same:
            p.must_compile = False

    # ---- what comes back

    def _finished(self, done: Finished) -> Event | None:
        """Writes down what a worker has told, not waiting for the disk; what is to be told of it, None = nothing."""
        fields = dict(done.outcome.fields)
        if done.overlapped_s is not None:
            fields["overlapped"] = done.overlapped_s
        if isinstance(done.job, PendingFinal):
            lost_placing = fields.pop("lost_placing", False) or done.outcome.stage == PLACING
            if lost_placing and not done.job.unplaced:
                done.job.unplaced = fields["message"]
                self._leave_for_later(done.lane, done.job)
                return None
            return self._add_record(done.job, fields, sync=False)
        p: PendingTrial = done.job
        status, text = fields.pop("status"), fields.pop("message")
        if status == "unavailable" or done.outcome.stage == "import":  # its other trials would end the same way
            self._unavailable[p.source] = text
        out_of_room = status == "oom" and self._workers.others_hold_memory(done.lane)
        if out_of_room or p.beside is None and status == "ok" and disturbed(fields):
            p.needs_room = out_of_room  # then the others end, so that it does not come here a second time
            p.beside = p.beside or (status, text, fields)
            self._leave_for_later(done.lane, p)
            return None
        if p.beside is not None and p.beside[0] == "ok":
            again = f"taken again alone; beside others {p.beside[2]['latency_ms']:.4g} ms, too uncertain"
            if status == "oom":  # it has run before: that there is no room now says nothing about it
                again = f"beside others, too uncertain; taken again alone: {text}"
                status, text, fields = p.beside
            fields["note"] = "; ".join(filter(None, (fields.get("note"), again)))
        return self._add_row(p, status, text, fields, sync=False)

    def _leave_for_later(self, lane: Lane, job: PendingTrial | PendingFinal) -> None:
        """Has a job that has run run once more, alone."""
        self._alone.append((lane, job))
        # finals last, and a worker's trials together: to be left alone it ends the others
        lanes = self._workers.lanes
        self._alone.sort(key=lambda one: (isinstance(one[1], PendingFinal), -lanes.index(one[0])))

    def _stage_limit_s(self, stage: str) -> float:
        timing = self._spec.timing
        # Peers compile on their first call, so a stage that can contain a compilation has the compiler's limit.
        return timing.compile_timeout_s if stage in ("import", "prepare", "run") else timing.measure_timeout_s

    def _wait(self) -> None:
        """Until a child has something to say, but no longer than to its deadline or the next tick."""
        left = self._workers.time_left_s()
        timeout = _TICK_S if left is None else min(_TICK_S, max(0.01, left))
        select.select([*self._pool.readable(), *self._workers.readable()], [], [], timeout)

    # ---- rows

    def _row(self, p: PendingTrial, status: str, text: str, **fields: Any) -> None:
        self._tell(self._add_row(p, status, text, fields))

    def _add_row(self, p: PendingTrial, status: str, text: str, fields: dict[str, Any], sync: bool = True) -> Event:
        found = self._catalogue.get(p)
        implementation, versions = (None, {}) if isinstance(found, str) else found
        row = self._store.append(make_row(p.trial, p.key, self._env, self._card, p.compiled, fields | {
            "status": status, "message": text, "versions": versions,
            "is_flash": implementation is not None and implementation.is_flash}), sync=sync)
        self._remember_binary(row)
        self._written.add(p.key)
        self._new_rows += 1
        self._done += 1
        return {"event": "row", "row": row, "done": self._done, "total": len(self._known)}

    def _record(self, f: PendingFinal, outcome: Mapping[str, Any]) -> None:
        self._tell(self._add_record(f, outcome))

    def _add_record(self, f: PendingFinal, outcome: Mapping[str, Any], sync: bool = True) -> Event:
        record = self._store.append_final(f.record(self._env, outcome), sync=sync)
        self._new_finals += 1
        self._done += 1
        return {"event": "final", "record": record, "done": self._done, "total": len(self._known)}

    def _on_stage(self, job: PendingTrial | PendingFinal, stage: str) -> None:
        self._tell({"event": "trial", "trial": job.id, "stage": stage})

    def _note(self, text: str) -> None:
        if text and text not in self._notes:
            self._notes.add(text)
            self._tell({"event": "note", "message": text})

    # ---- stopping

    def _check_limit(self) -> None:
        if not self.stopped and self._limit_s is not None and time.monotonic() - self._begin > self._limit_s:
            self.stopped = "limit"

    @contextlib.contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the running trials finish, the second one does what it always does."""
        before: dict[signal.Signals, Any] = {}

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = "interrupted"
            signal.signal(number, before[signal.Signals(number)])

        with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's business
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        self._pool.close()
        self._workers.close()

    def summary(self) -> RunSummary:
        elapsed = time.monotonic() - self._begin
        return RunSummary(
            run_dir=self._store.run_dir, counts=dict(Counter(row["status"] for row in self._store.rows())),
            new_rows=self._new_rows, remaining=len(self._waiting) + len(self._alone), stopped=self.stopped,
            elapsed_s=elapsed, gpu_busy=self._workers.gpu_s / elapsed, seconds=self._workers.seconds,
            workers=self._workers.by_worker, new_finals=self._new_finals, cache_hits=self._cache_hits,
            cache_misses=self._cache_misses)

    def write_sitting(self) -> None:
        self._store.add_sitting({"start": self._start, "environment": self._fingerprint, **self.summary().sitting()})
