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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Worker:
    """A process that makes cases; where one takes too long, or kills it, the next one gets a new process.

    Args:
        command: what it runs.
    """

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "tests.hopper_worker")) -> None:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._env = {**os.environ, "PYTHONPATH": paths}
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def ask(self, case: Mapping[str, Any], timeout_s: float) -> list[str]:
        """What is wrong with the case's results; a hang and a crash are wrong, too."""
        if self._process is None:
            self._start()
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
            code = self._process.wait()
            self._process = None
            return [f"the process ended with status {code}"]
        found: list[str]
        found, ends = json.loads(line)
        if ends:
            self.close()
        return found

    def _start(self) -> None:
        process = self._process = subprocess.Popen(
            self._command, env=self._env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        answers = self._answers = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                answers.put(line)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()

    def close(self) -> None:
        """Kill the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def main() -> None:
    """A case per line of stdin; per line of stdout its problems, and whether the process is of no more use: after a
    CUDA error nothing can follow."""
    from tests.hopper_cases import Case, problems

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    for line in sys.stdin:
        fatal = False
        try:
            found = problems(Case(**json.loads(line)))
        except Exception as error:  # a result like any other
            found = [f"{type(error).__name__}: {error}"[:2000]]
            fatal = "CUDA" in str(error)
        print(json.dumps([found, fatal]), file=answers, flush=True)


if __name__ == "__main__":
    main()
