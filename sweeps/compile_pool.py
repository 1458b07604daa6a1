"""Compilation ahead of the GPU worker, in CPU processes that share Triton's cache on disk with it and may die."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.cases import Case
from sweeps.child import Child, Connection, connect, explain_exit
from sweeps.failures import classify, message, shorten

_ENV = {"FLASH_SINK_ATTN_COMPILE_ONLY": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1"}
_START_LIMIT_S = 180.0
_MAX_FAILED_STARTS = 3


@dataclasses.dataclass(frozen=True)
class CompileTask:
    """One configuration to build: ``id`` is the caller's, the rest names what to build."""

    id: str
    implementation: str
    options: Mapping[str, Any]
    case: Case
    config: Mapping[str, Any]
    arch: int


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """Attributes: status (ok, compile_error, out_of_resources or timeout), resources (what Implementation.compile
    returned; {} = nothing to build), compile_s (seconds)."""

    id: str
    status: str
    message: str = ""
    resources: dict[str, Any] = dataclasses.field(default_factory=dict)
    compile_s: float | None = None


@dataclasses.dataclass
class _Compiler:
    child: Child
    ready: bool = False
    task: CompileTask | None = None
    since: float = dataclasses.field(default_factory=time.monotonic)


class CompilePool:
    """Builds tasks in the order they were submitted, ``processes`` at a time. It starts no thread and never blocks:
    the caller waits for :meth:`readable` (or a second) and then takes what :meth:`poll` returns.

    Args:
        processes: at most so many compilers; they start when there is work.
        timeout_s: limit of one build; the process is killed, the row's status is ``timeout``.
    """

    def __init__(self, processes: int, timeout_s: float) -> None:
        self._size = max(1, processes)
        self._timeout_s = timeout_s
        self._tasks: deque[CompileTask] = deque()
        self._compilers: list[_Compiler] = []
        self._failed_starts = 0

    def submit(self, tasks: Sequence[CompileTask]) -> None:
        """Takes the tasks, and starts compilers for them."""
        self._tasks.extend(tasks)
        if self._failed_starts < _MAX_FAILED_STARTS:
            self._hand_out()

    def withdraw(self, ids: set[str]) -> None:
        """Forgets tasks that nobody has begun."""
        self._tasks = deque(task for task in self._tasks if task.id not in ids)

    def readable(self) -> Sequence[Child]:
        """What becomes readable when :meth:`poll` has something to do."""
        return [compiler.child for compiler in self._compilers]

    def poll(self) -> list[CompileResult]:
        """Moves everything on, without waiting. Returns the builds that ended."""
        results: list[CompileResult] = []
        for compiler in list(self._compilers):
            replies, alive = compiler.child.listen()
            for reply in replies:
                self._hear(compiler, reply, results)
            limit = self._timeout_s if compiler.ready else _START_LIMIT_S
            if not alive:
                self._died(compiler, explain_exit(compiler.child.close()), results)
            elif (compiler.task or not compiler.ready) and time.monotonic() - compiler.since > limit:
                self._overdue(compiler, limit, results)
        self._assign(results)
        return results

    def close(self) -> None:
        """Kills the compilers; nobody is left who wants their work."""
        for compiler in self._compilers:
            compiler.child.kill()
        self._compilers = []
        self._tasks.clear()

    def _assign(self, results: list[CompileResult]) -> None:
        if self._failed_starts >= _MAX_FAILED_STARTS:  # no compiler will come up: the tasks must not wait for ever
            while self._tasks:
                results.append(CompileResult(self._tasks.popleft().id, "compile_error",
                                             "the compiler process cannot be started"))
        self._hand_out()

    def _hand_out(self) -> None:
        while len(self._compilers) < min(self._size, len(self._tasks) + self._busy()):
            self._compilers.append(_Compiler(Child("sweeps.compile_pool", env=_ENV)))
        for compiler in self._compilers:
            if compiler.ready and compiler.task is None and self._tasks:
                task = self._tasks.popleft()
                compiler.task, compiler.since = task, time.monotonic()
                compiler.child.mark()
                compiler.child.send(dataclasses.asdict(task) | {"case": task.case.to_dict()})

    def _busy(self) -> int:
        return sum(compiler.task is not None for compiler in self._compilers)

    def _hear(self, compiler: _Compiler, reply: dict[str, Any], results: list[CompileResult]) -> None:
        if reply["event"] == "ready":
            compiler.ready = True
            self._failed_starts = 0
        elif compiler.task is not None:
            compiler.task = None
            results.append(CompileResult(**{k: v for k, v in reply.items() if k != "event"}))

    def _died(self, compiler: _Compiler, how: str, results: list[CompileResult]) -> None:
        self._compilers.remove(compiler)
        if not compiler.ready:
            self._failed_starts += 1
        if compiler.task:
            text = f"the compiler process ended ({how}): {shorten(compiler.child.tail())}"
            results.append(CompileResult(compiler.task.id, "compile_error", text,
                                         compile_s=time.monotonic() - compiler.since))

    def _overdue(self, compiler: _Compiler, limit: float, results: list[CompileResult]) -> None:
        self._compilers.remove(compiler)
        compiler.child.kill()
        if compiler.task:
            results.append(CompileResult(compiler.task.id, "timeout", f"compile: longer than its limit of {limit:g} s",
                                         compile_s=time.monotonic() - compiler.since))
        else:
            self._failed_starts += 1


def _serve(connection: Connection) -> None:
    import flash_sink_attn  # noqa: F401  (with Torch and Triton, so that their import is in nobody's compile_s)
    from sweeps.registry import load

    connection.send({"event": "ready"})
    for request in connection:
        reply: dict[str, Any] = {"event": "built", "id": request["id"]}
        start = time.perf_counter()
        try:
            implementation = load(request["implementation"], request["options"])
            resources = implementation.compile(Case.from_dict(request["case"]), request["config"], request["arch"])
            reply |= {"status": "ok", "resources": dict(resources)}
        except Exception as error:
            reply |= {"status": classify(error, building=True), "message": message(error)}
        connection.send(reply | {"compile_s": time.perf_counter() - start})


if __name__ == "__main__":
    os.nice(10)  # the worker beside it is timing calls
    _serve(connect())
    os._exit(0)
