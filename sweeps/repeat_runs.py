"""Runs a sweep several times, each in a process of its own, and times what they chose once more; can be continued.

::

    spec.yaml      the sweep
    repeat.json    first {"times": N}, in the end the answer as well
    cache/         the kernel cache of these runs alone; removed in the end
    run-1, ...     run directories, see sweeps.store
    truth          the run directory of the last finals
    repeat.md, repeat.csv
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sweeps.repeat import Repeatability, is_complete, run_dirs, truth_round, truth_spec, write_repeat
from sweeps.runner import run
from sweeps.select import select_run
from sweeps.spec import SweepSpec
from sweeps.specfile import dump_spec, load_spec

ROOT = Path(__file__).resolve().parent.parent
INTERRUPTED = 130


class RepeatError(RuntimeError):
    """It cannot go on; ``code`` is the exit status of the run that ended it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def begin(folder: Path, spec: SweepSpec, times: int) -> None:
    """Makes the folder of a repetition.

    Raises:
        ValueError: ``times`` is not at least 2, or there is one already.
    """
    if times < 2:
        raise ValueError(f"--times: expected at least 2, got {times}")
    if (folder / "repeat.json").exists():
        raise ValueError(f"--out: {folder} holds a repetition already; --resume {folder} goes on with it")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text(dump_spec(spec))
    (folder / "repeat.json").write_text(json.dumps({"times": times}) + "\n")


def times_of(folder: Path) -> int:
    """How many runs a repetition has.

    Raises:
        ValueError: it is not one.
    """
    try:
        state = json.loads((folder / "repeat.json").read_text())
        return int(state.get("times") or state["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--resume: expected the folder of a repetition, got {folder} ({error})") from error


def go_on(folder: Path, *, any_gpu: bool = False, say: Callable[[str], None] = print,
          sweep: Callable[[Sequence[str], Mapping[str, str]], int] | None = None) -> Repeatability:
    """Does what is left: the runs that are not complete, the last finals, the answer.

    Args:
        folder: made by :func:`begin`.
        any_gpu: run a config on a card it is not made for.
        say: told what comes next.
        sweep: runs ``python`` with these arguments and environment and returns its exit status; default a process.

    Raises:
        RepeatError: a run ended before its time.
        ValueError, StoreError, RunError: as those of what it calls.
    """
    times = times_of(folder)
    sweep = sweep or _sweep
    environment = {"TRITON_CACHE_DIR": str((folder / "cache").resolve())}
    for number, run_dir in enumerate(run_dirs(folder, times), 1):
        if is_complete(run_dir):
            continue
        say(f"run {number} of {times}")
        started = (run_dir / "trials.jsonl").is_file()
        where = ["--resume", str(run_dir)] if started else [str(folder / "spec.yaml"), "--out", str(run_dir)]
        code = sweep(["-m", "sweeps", "run", *where, *(["--any-gpu"] if any_gpu else [])], environment)
        if code:
            raise RepeatError(f"run {number} of {times} ended with exit status {code}", code)
        if not is_complete(run_dir):
            raise RepeatError(f"run {number} of {times} is not complete", 1)
    if not is_complete(folder / "truth"):
        say("the last finals")
        _truth(folder, times, environment)
    found = write_repeat(folder, times)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return found


def _truth(folder: Path, times: int, environment: Mapping[str, str]) -> None:
    selections = [select_run(run_dir) for run_dir in run_dirs(folder, times)]
    finals = truth_round(selections)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        done = run(truth_spec(load_spec(folder / "spec.yaml")), folder / "truth", phases=[lambda rows: finals])
    finally:
        os.environ.clear()
        os.environ.update(before)
    if done.stopped:
        raise RepeatError("interrupted during the last finals", INTERRUPTED)


def _sweep(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """One process. Ctrl-C reaches it by itself, and it ends in its own good time."""
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    with _left_to_the_child():
        return subprocess.run([sys.executable, *arguments], check=False,
                              env={**os.environ, "PYTHONPATH": paths, **environment}).returncode


@contextmanager
def _left_to_the_child() -> Iterator[None]:
    def pass_by(number: int, frame: FrameType | None) -> Any:
        return None

    # A handler, not SIG_IGN: the child would inherit that.
    before = signal.signal(signal.SIGINT, pass_by)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
