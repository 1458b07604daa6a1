"""Runs the trials of a sweep: owns the log, feeds the compilers and the worker, outlives both.

One loop in one process and no thread: it waits until a compiler or the worker has something to say, writes down what it
was, and hands out the next piece of work. Whatever happens to a child costs at most the trial it was on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from sweeps.environment import environment, fingerprint, row_key
from sweeps.failures import message, shorten
from sweeps.implementation import Implementation
from sweeps.measure import Sampling
from sweeps.plan import Trial
from sweeps.registry import load
from sweeps.rows import make_row
from sweeps.spec import SweepSpec
from sweeps.store import Row, Store, StoreError
from sweeps.supervisor import Outcome, RunError, Supervisor

__all__ = ["RunError", "RunSummary", "run"]

Event = dict[str, Any]
Phase = Callable[[list[Row]], Sequence[Trial]]

_TICK_S = 0.5
_GPU_STAGES = ("inputs", "run", "gate", "measure", "check")
_COMPILED_ONLY = "compiled only, not run"


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes:
        run_dir: where its files are.
        counts: rows by status, of the whole run directory.
        new_rows: rows written this time.
        remaining: trials of the phase it stopped in that have no row yet.
        stopped: "" (complete), "interrupted" or "limit".
        elapsed_s: of this time.
        gpu_busy: share of the elapsed time in which the worker prepared inputs, ran, checked or timed on its device.
        seconds: where the worker's time went, by stage; "waiting" is time without a trial to run, "starting" that of
            new workers.
    """

    run_dir: Path
    counts: dict[str, int]
    new_rows: int
    remaining: int
    stopped: str
    elapsed_s: float
    gpu_busy: float
    seconds: dict[str, float]

    @property
    def interrupted(self) -> bool:
        return self.stopped == "interrupted"


@dataclasses.dataclass(eq=False)
class _Pending:
    """A trial that still has to become a row."""

    trial: Trial
    use: str
    key: str = ""
    compiled: CompileResult | None = None
    must_compile: bool = False

    @property
    def ready(self) -> bool:
        return self.compiled is not None or not self.must_compile

    @property
    def source(self) -> str:
        """Which implementation, with which options."""
        return json.dumps([self.use, dict(self.trial.options)], sort_keys=True)


def run(spec: SweepSpec, run_dir: Path, *, phases: Sequence[Phase], limit_minutes: float | None = None,
        on_event: Callable[[Event], None] | None = None, retry: Collection[str] = (), compile_only: bool = False,
        compilers: int | None = None) -> RunSummary:
    """Turns every trial into a row, and what is already in ``run_dir`` is not done again.

    Args:
        spec: names the implementations, says how to time and whether to check.
        run_dir: a new directory, or one to resume.
        phases: each is given all rows so far and returns the trials it wants, in the order they should run.
        limit_minutes: no trial is begun after this time; None = no limit.
        on_event: told of ``{"event": "phase", "phase", "done", "total"}`` (trials of the phase; number from 1),
            ``{"event": "trial", "trial", "stage"}``, ``{"event": "row", "row", "done", "total"}`` and
            ``{"event": "note", "message"}``.
        retry: statuses whose rows are tried again, such as ("crashed", "timeout"); the later row replaces the earlier.
        compile_only: build for the spec's architecture and touch no device; the rows have resources and no times.
        compilers: CPU processes that compile ahead; default all cores but two, at least one.

    A first Ctrl-C (or SIGTERM) finishes the running trial's row and returns; a second one stops at once.

    Raises:
        StoreError: ``run_dir`` is in use or not a run; StoreFull when a row could not be written.
        RunError: no worker can be started.
    """
    with Store(run_dir) as store:
        runner = _Runner(spec, store, on_event or (lambda event: None), limit_minutes, frozenset(retry),
                         compile_only, compilers)
        with runner.stopping_on_signals():
            try:
                for number, phase in enumerate(phases, 1):
                    runner.phase(number, phase(store.rows()))
                    if runner.stopped:
                        break
            except BaseException:
                runner.close()
                with contextlib.suppress(StoreError):
                    store.write_results_csv()
                raise
            runner.close()
            store.write_results_csv()
        return runner.summary()


class _Runner:
    def __init__(self, spec: SweepSpec, store: Store, tell: Callable[[Event], None],
                 limit_minutes: float | None, retry: frozenset[str], compile_only: bool, compilers: int | None) -> None:
        self._spec, self._store, self._tell, self._retry = spec, store, tell, retry
        self._begin = time.monotonic()
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
        timing = spec.timing
        self._sampling = Sampling(**{f.name: getattr(timing, f.name) for f in dataclasses.fields(Sampling)})
        cores = self._env["cpu_count"]
        self._pool = CompilePool(compilers or max(1, cores - 2), timing.compile_timeout_s)
        self._implementations: dict[str, tuple[Implementation, dict[str, str]] | str] = {}
        self._unavailable: dict[str, str] = {}
        self._prebuilt: set[str] = set()  # implementations with nothing to build ahead
        self._binaries: dict[tuple[str, str, str], str] = {}
        for row in store.rows():
            self._remember_binary(row)
        self._worker = Supervisor(self._stage_limit_s, self._on_stage, self._note)
        self._current: _Pending | None = None
        self._waiting: list[_Pending] = []
        self._known: set[str] = set()  # keys of the phase's trials
        self._new_rows = self._done = 0
        self._notes: set[str] = set()
        self.stopped = ""

    # ---- what is to be done

    def phase(self, number: int, trials: Sequence[Trial]) -> None:
        """Makes a row of every trial, unless it is told to stop before."""
        self._waiting = self._outstanding(trials)
        self._done = len(self._known) - len(self._waiting)
        self._tell({"event": "phase", "phase": number, "done": self._done, "total": len(self._known)})
        for p in list(self._waiting):
            if self._settled_unrun(p):
                self._waiting.remove(p)
        self._pool.submit([CompileTask(p.key, p.use, p.trial.options, p.trial.case, p.trial.config, self._env["arch"])
                           for p in self._waiting if p.must_compile])
        while self._waiting or self._current:
            self._check_limit()
            if self.stopped and not self._current:
                break
            if not self.stopped:
                self._assign()
            self._wait()
            for result in self._pool.poll():
                self._built(result)
            if outcome := self._worker.poll():
                self._finished(outcome)

    def _outstanding(self, trials: Sequence[Trial]) -> list[_Pending]:
        """The trials without a row, each once."""
        statuses = {row["key"]: row["status"] for row in self._store.rows()}
        found: dict[str, _Pending] = {}
        self._known = set()
        for trial in trials:
            p = _Pending(trial, self._spec.implementations[trial.impl].use or trial.impl)
            found_here = self._implementation(p)
            p.key = row_key(trial.id, {} if isinstance(found_here, str) else found_here[1], self._env)
            self._known.add(p.key)
            if p.key not in statuses or statuses[p.key] in self._retry:
                found.setdefault(p.key, p)
        return list(found.values())

    def _settled_unrun(self, p: _Pending) -> bool:
        """Writes the row of a trial whose outcome is known without running anything."""
        found = self._implementation(p)
        if isinstance(found, str):
            self._row(p, "unavailable", found)
        elif reason := p.trial.unsupported or found[0].unsupported(p.trial.case):
            self._row(p, "unsupported", shorten(reason))
        elif p.trial.rejected:
            self._row(p, "rejected", shorten(p.trial.rejected))
        elif self._store.starts_without_row(p.key) >= 2:
            self._row(p, "crashed", "the whole run ended twice while this trial was running; it is not tried again")
        else:
            p.must_compile = self._env["arch"] is not None and p.source not in self._prebuilt
            return False
        return True

    def _implementation(self, p: _Pending) -> tuple[Implementation, dict[str, str]] | str:
        """The loaded implementation and its versions, or why it cannot be loaded."""
        if p.source not in self._implementations:
            try:
                implementation = load(p.use, p.trial.options)
                self._implementations[p.source] = implementation, dict(implementation.versions())
            except Exception as error:  # a user's module can raise anything
                self._implementations[p.source] = message(error)
        return self._implementations[p.source]

    # ---- handing out work

    def _assign(self) -> None:
        """Gives an idle worker the first trial that is ready."""
        if self._compile_only or self._current or not self._waiting:
            return
        while self._worker.idle and (p := next((p for p in self._waiting if p.ready), None)) is not None:
            if p.source in self._unavailable:
                self._row(p, "unavailable", self._unavailable[p.source])
            elif not self._is_duplicate(p) and not self._submit(p):
                return
            self._waiting.remove(p)

    def _submit(self, p: _Pending) -> bool:
        self._store.start(p.key, p.trial.id)
        self._current = p
        taken = self._worker.submit({
            "trial": p.trial.id, "implementation": p.use, "options": dict(p.trial.options),
            "case": p.trial.case.to_dict(), "config": dict(p.trial.config), "gate": self._spec.gate.enabled,
            "sampling": dataclasses.asdict(self._sampling)})
        if not taken:
            self._current = None
        return taken

    def _is_duplicate(self, p: _Pending) -> bool:
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
        shared = result.resources.get("shared_bytes") or 0
        failed = ""
        if result.status == "ok" and self._shared_limit and shared > self._shared_limit:
            failed = f"shared memory: needs {shared} bytes, a block has {self._shared_limit}"
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

    # ---- the worker

    def _finished(self, outcome: Outcome) -> None:
        p, self._current = self._current, None
        if p is None:
            return
        fields = dict(outcome.fields)
        status, text = fields.pop("status"), fields.pop("message")
        if status == "unavailable" or outcome.stage == "import":  # all further trials of it would end the same way
            self._unavailable[p.source] = text
        self._row(p, status, text, **fields)

    def _stage_limit_s(self, stage: str) -> float:
        timing = self._spec.timing
        # Peers compile on their first call, so a stage that can contain a compilation has the compiler's limit.
        return timing.compile_timeout_s if stage in ("import", "prepare", "run") else timing.measure_timeout_s

    def _wait(self) -> None:
        """Until a child has something to say, but no longer than to its deadline or the next tick."""
        left = self._worker.time_left_s()
        timeout = _TICK_S if left is None else min(_TICK_S, max(0.01, left))
        select.select([*self._pool.readable(), *self._worker.readable()], [], [], timeout)

    # ---- rows

    def _row(self, p: _Pending, status: str, text: str, **fields: Any) -> None:
        found = self._implementation(p)
        implementation, versions = (None, {}) if isinstance(found, str) else found
        row = self._store.append(make_row(p.trial, p.key, self._env, self._card, p.compiled, fields | {
            "status": status, "message": text, "versions": versions,
            "is_flash": implementation is not None and implementation.is_flash}))
        self._remember_binary(row)
        self._new_rows += 1
        self._done += 1
        self._tell({"event": "row", "row": row, "done": self._done, "total": len(self._known)})

    def _on_stage(self, stage: str) -> None:
        if self._current:
            self._tell({"event": "trial", "trial": self._current.trial.id, "stage": stage})

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
        """The first SIGINT or SIGTERM lets the running trial finish, the second one does what it always does."""
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
        self._worker.close()

    def summary(self) -> RunSummary:
        elapsed, seconds = time.monotonic() - self._begin, self._worker.seconds
        return RunSummary(
            run_dir=self._store.run_dir, counts=dict(Counter(row["status"] for row in self._store.rows())),
            new_rows=self._new_rows, remaining=len(self._waiting), stopped=self.stopped, elapsed_s=elapsed,
            gpu_busy=sum(seconds.get(stage, 0.0) for stage in _GPU_STAGES) / elapsed,
            seconds={stage: round(s, 3) for stage, s in seconds.items()})
