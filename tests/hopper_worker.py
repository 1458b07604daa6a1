"""Calls that may hang, made in a process that can be killed.

``Worker`` asks and ``python -m tests.hopper_worker`` answers. A hanging kernel never returns its caller, and no Python
in that process runs again.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """A process that makes cases; where one takes too long, or kills it, the next one gets a new process.

    Args:
        command: what it runs, see :func:`serve`.
        env: its environment variables, instead of this process's own.
        start_s: how long it may take to come up, beside the time of the first case.

    Attributes:
        built: kernels that were not in Triton's cache when a call needed them, in all its processes.
    """

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "tests.hopper_worker"),
                 env: Mapping[str, str] | None = None, start_s: float = 180.0) -> None:
        env = os.environ if env is None else env
        self._env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))}
        self._command, self._start_s = command, start_s
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self.built = 0

    def ask(self, case: Mapping[str, Any], timeout_s: float) -> list[str]:
        """What is wrong with the case's results; a hang and a crash are wrong, too."""
        if self._process is None and not self.start():
            return self._ended(f"the process did not come up in {self._start_s:.0f} s")
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            return [f"no answer after {timeout_s:.0f} s: it hangs"]
        except OSError:
            line = ""
        if not line:
            return self._ended("")
        found, ends, built = json.loads(line)
        self.built += built
        if ends:
            self.close()
        return [str(message) for message in found]

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> bool:
        """Start the process and wait for it; False where it does not come up."""
        process = self._process = subprocess.Popen(
            self._command, env=self._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        answers = self._answers = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                answers.put(line)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()
        try:
            return bool(answers.get(timeout=self._start_s))
        except queue.Empty:
            return False

    def _ended(self, otherwise: str) -> list[str]:
        """Why there is no answer from a process that has closed its output, or else ``otherwise``."""
        process, self._process = self._process, None
        assert process is not None
        try:
            return [f"the process ended with status {process.wait(5 if otherwise else 60)}"]
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return [otherwise or "the process closed its output"]

    def close(self) -> None:
        """Kill the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def serve(answer: Callable[[dict[str, Any]], list[str]], come_up: Callable[[], object] = lambda: None) -> None:
    """A task per line of stdin; per line of stdout its problems, whether the process is of no more use (after a CUDA
    error nothing can follow), and how many kernels were not in Triton's cache. The first line says that it is up.

    Args:
        answer: the problems of a task; what it raises is a problem, too.
        come_up: what takes long and belongs to no task.
    """
    from flash_sink_attn.kernel_cache import watch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    come_up()
    print("up", file=answers, flush=True)
    for line in sys.stdin:
        fatal = False
        with watch() as cache:
            try:
                found = answer(json.loads(line))
            except Exception as error:  # a result like any other
                found = [f"{type(error).__name__}: {error}"[:2000]]
                fatal = "CUDA" in str(error)
        print(json.dumps([found, fatal, cache.misses]), file=answers, flush=True)


def serve_cases(problems: Callable[[Any], list[str]], case_type: Callable[..., Any]) -> None:
    """:func:`serve` cases on the card."""
    import torch

    def come_up() -> None:
        from flash_sink_attn.hopper import launch_backward  # noqa: F401

        torch.zeros(1, device="cuda")

    serve(lambda fields: problems(case_type(**fields)), come_up)


if __name__ == "__main__":
    from tests.hopper_cases import Case, problems

    serve_cases(problems, Case)
