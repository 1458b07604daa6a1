"""What tests.hopper_random and tests.hopper_backward_random share: kernels built first, then calls side by side.

The kernels go into Triton's cache on disk, built without the GPU by processes that take one after the other. Then
processes make the calls, of which several share the card: a call waits for the host most of the time. One that hangs is
killed, its seed named, and a new one started. The last line sums up; the exit status is 1 where anything was wrong or
not done.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.hopper_worker import Worker, serve

# Kernels that take a second or two, built when the others are done or on their way.
QUICK = ("hopper_bwd_offsets_kernel", "hopper_bwd_rows_kernel", "hopper_bwd_finish_kernel", "hopper_bwd_join_kernel")
MOST_HANGS = 3  # in all; more say nothing new and take long
COMPILE_LIMIT_S = 300.0  # of one kernel


class Answer(NamedTuple):
    """What a process said of a task, and after how long, its own start not counted."""

    task: dict[str, Any]
    wrong: list[str]
    seconds: float


def ask_all(tasks: Iterable[dict[str, Any]], workers: Sequence[Worker], timeout_s: float, until: float,
            hear: Callable[[Answer], bool]) -> None:
    """Hand tasks out, each to the next process that is free, until a time of time.monotonic.

    Args:
        workers: closed at the end.
        timeout_s: after which a task hangs.
        hear: is told of each answer, one at a time; False ends it.
    """
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    lock, ended = threading.Lock(), threading.Event()

    def work(worker: Worker) -> None:
        while not ended.is_set():
            if not worker.running and (time.monotonic() > until or waiting.empty() or not worker.start()):
                break
            if time.monotonic() > until:
                break
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                break
            begin = time.monotonic()
            wrong = worker.ask(task, timeout_s)
            with lock:
                if not hear(Answer(task, wrong, time.monotonic() - begin)):
                    ended.set()
        worker.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------------------------------------ kernels


def kernels(module: str, cases: Iterable[Any]) -> list[dict[str, Any]]:
    """Every kernel that the cases use, once, as a task for :func:`build_kernel`: a case and which launch of its it is.
    What takes long comes first."""
    of = importlib.import_module(module)
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        for index, name in enumerate(of.kernels_of(case)):
            if name not in found:
                found[name] = {"module": module, "case": case.to_dict(), "launch": index, "name": name}
    return sorted(found.values(), key=lambda task: task["name"].startswith(QUICK))


def build_kernel(task: Mapping[str, Any]) -> list[str]:
    """Compile a kernel into Triton's cache, with Triton's stub for its launch, in a process for that."""
    from flash_sink_attn.compile_only import _build_launcher
    from flash_sink_attn.launcher import launch

    of, left = importlib.import_module(task["module"]), [task["launch"]]

    def only_that(*of_launch: Any, **how: Any) -> None:
        if left[0] == 0:
            with contextlib.redirect_stdout(io.StringIO()):  # Triton prints all of a kernel that the assembler refuses
                _build_launcher(launch(*of_launch, **how))
        left[0] -= 1

    of.build(of.Case(**task["case"]), only_that)
    return []


def _serve_kernels() -> None:
    from flash_sink_attn.compile_only import set_target

    def come_up() -> None:
        from flash_sink_attn.hopper import launch_backward  # noqa: F401

        set_target(90)

    serve(build_kernel, come_up)


def without_gpu() -> dict[str, str]:
    """The environment of a process that compiles; nothing in it is part of a kernel's key."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # what a machine without a GPU sets
    return env | {"FLASH_SINK_ATTN_COMPILE_ONLY": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def compile_kernels(tasks: Sequence[dict[str, Any]], processes: int, until: float) -> tuple[list[str], str]:
    """Build kernels, several at a time: what went wrong, and a line that sums up."""
    start = time.monotonic()
    workers = [Worker((sys.executable, "-m", "tests.random_calls"), without_gpu())
               for _ in range(max(1, min(processes, len(tasks))))]
    broken: list[str] = []
    answers: list[Answer] = []

    def hear(answer: Answer) -> bool:
        answers.append(answer)
        broken.extend(f"{answer.task['name']}: {message}" for message in answer.wrong)
        return True

    ask_all(tasks, workers, COMPILE_LIMIT_S, until, hear)
    if len(answers) < len(tasks):
        broken.append(f"{len(tasks) - len(answers)} of {len(tasks)} kernels were not begun")
    longest = max(answers, key=lambda a: a.seconds, default=None)
    return broken, (
        f"{len(answers) - len(broken)} of {len(tasks)} kernels in the cache after {time.monotonic() - start:.0f} s, "
        f"{sum(w.built for w in workers)} of them compiled now by {len(workers)} processes"
        + (f"; the longest took {longest.seconds:.1f} s ({longest.task['name'].split()[0]}), together "
           f"{sum(a.seconds for a in answers):.0f} s" if longest else ""))


# -------------------------------------------------------------------------------------------------------------- calls


def make_calls(cases: Mapping[int, Any], workers: Sequence[Worker], stall_s: float, until: float,
               out: Path | None = None) -> tuple[bool, str]:
    """Make calls and print what is wrong as it comes. Returns whether all were made and right, and a line on them."""
    start = time.monotonic()
    wrong: dict[int, list[str]] = {}
    hung: list[int] = []
    seconds: list[float] = []

    def hear(answer: Answer) -> bool:
        seconds.append(answer.seconds)
        if answer.wrong:
            seed = answer.task["seed"]
            wrong[seed] = answer.wrong
            if any("it hangs" in message for message in answer.wrong):
                hung.append(seed)
            print(f"seed {seed}: {'; '.join(answer.wrong)[:240]}", flush=True)
            if out:
                with out.open("a") as file:
                    print(json.dumps({"seed": seed, "case": answer.task, "wrong": answer.wrong}), file=file)
        return len(hung) < MOST_HANGS

    ask_all((case.to_dict() for case in cases.values()), workers, stall_s, until, hear)
    done = len(seconds) == len(cases) and not wrong
    return done, (
        f"{len(seconds)} of {len(cases)} calls in {time.monotonic() - start:.0f} s by {len(workers)} processes"
        + (f", {sum(seconds) / len(seconds):.2f} s each, {max(seconds):.1f} s at most" if seconds else "")
        + f"; {sum(w.built for w in workers)} kernels were not in the cache: {len(wrong)} wrong, {len(hung)} of them "
          f"hangs" + (f"; seeds {' '.join(map(str, sorted(wrong)))}" if wrong else ""))


def main(module: str, description: str | None, answers: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """The command line of an entry point.

    Args:
        module: where Case, draw, build and kernels_of are.
        answers: the command that makes cases, see tests.hopper_worker.
    """
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first call")
    parser.add_argument("--kinds", type=int, help="how many kinds of calls there are; default all")
    parser.add_argument("--only", type=int, nargs="*", help="these seeds alone")
    parser.add_argument("--compile-only", type=int, nargs="?", const=cores, metavar="N",
                        help="build the kernels in N processes, default one per core, and make no call")
    parser.add_argument("--compiled", action="store_true", help="the kernels are in the cache: make calls at once")
    parser.add_argument("--workers", type=int, default=min(8, cores), help="processes that make calls")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which nothing is begun")
    parser.add_argument("--stall", type=float, default=30.0, help="seconds after which a call hangs")
    parser.add_argument("--out", type=Path, help="a file for what was wrong, in full, as JSON lines")
    given = parser.parse_args(arguments)
    until = time.monotonic() + given.limit
    draw = importlib.import_module(module).draw
    how = {} if given.kinds is None else {"kinds": given.kinds}
    seeds = list(range(given.first, given.first + given.count)) if given.only is None else given.only
    cases = {seed: draw(seed, **how) for seed in seeds}
    broken: list[str] = []
    if not given.compiled:
        broken, line = compile_kernels(kernels(module, cases.values()), given.compile_only or cores, until)
        print(*broken, line, sep="\n", flush=True)
    if given.compile_only is not None:
        return 1 if broken else 0
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    workers = [Worker(answers, env) for _ in range(max(1, min(given.workers, len(cases))))]
    right, line = make_calls(cases, workers, given.stall, until, given.out)
    print(line)
    return 0 if right and not broken else 1


if __name__ == "__main__":
    _serve_kernels()
