"""A helper process that may die: JSON lines over two pipes of its own, output in a file, killed with all it started.

The pipes are not stdin and stdout, so nothing a library prints can corrupt the protocol.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

_PIPE_VARIABLE = "SWEEPS_CHILD_PIPES"
_PR_SET_PDEATHSIG = 1


class Child:
    """The parent's end of ``python -m module``.

    Args:
        module: the module to run; its main calls :func:`connect`.
        env: variables set on top of this process's own.
        arguments: its command line.
    """

    def __init__(self, module: str, *, env: Mapping[str, str] | None = None, arguments: tuple[str, ...] = ()) -> None:
        down_read, self._down = os.pipe()
        self._up, up_write = os.pipe()
        self._buffer = b""
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self._mark = 0
        self._last_words = ""
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)  # imports in the child find what they find here
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", module, *arguments], pass_fds=(down_read, up_write),
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C belongs to the parent, and one signal can end the whole group
                env={**os.environ, "PYTHONPATH": paths, **(env or {}), _PIPE_VARIABLE: f"{down_read},{up_write}"})
        finally:
            os.close(down_read)
            os.close(up_write)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        """Whether the process is gone. Its pipes can outlive it in the hands of something that it started."""
        return self._process.poll() is not None

    def fileno(self) -> int:
        """The descriptor that becomes readable when the child has said something or has ended."""
        return self._up

    def send(self, message: Mapping[str, Any]) -> bool:
        """Hands the child one message; False when it has already ended."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._down, data):]
        except BrokenPipeError:
            return False
        return True

    def listen(self) -> tuple[list[dict[str, Any]], bool]:
        """What the child has said since, without waiting, and whether it lives; if not, that was all."""
        alive = not self.ended()  # asked first: whatever it wrote before it ended is in the pipe by now
        while select.select([self._up], [], [], 0)[0]:
            data = os.read(self._up, 1 << 16)
            if not data:
                alive = False
                break
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines], alive

    def mark(self) -> None:
        """Makes :meth:`tail` start here."""
        self._mark = os.fstat(self._log.fileno()).st_size

    def tail(self, limit: int = 1500) -> str:
        """The end of what the child printed since :meth:`mark`; still there after :meth:`close`."""
        if self._log.closed:
            return self._last_words[-limit:]
        size = os.fstat(self._log.fileno()).st_size
        start = max(self._mark, size - limit)
        return os.pread(self._log.fileno(), size - start, start).decode(errors="replace").strip()

    def kill(self) -> int:
        """Ends the child and everything it started; returns its exit status (negative: the signal that ended it)."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self.close()

    def close(self, grace_s: float = 60.0) -> int:
        """Waits for a child that has ended or, told so by its closed pipe, is about to; returns its exit status."""
        if self._down >= 0:
            os.close(self._down)
            os.close(self._up)
            self._down = self._up = -1
        try:
            status = self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            try:
                status = self._process.wait(grace_s)
            except subprocess.TimeoutExpired:  # held by its driver: whoever comes next will say what is wrong
                status = -signal.SIGKILL
        if not self._log.closed:
            self._last_words = self.tail()
            self._log.close()
        return status


def explain_exit(status: int) -> str:
    """``exit status`` of a child in words: "killed by SIGSEGV", "exit status 3"."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


class Connection:
    """The child's end."""

    def __init__(self, down: int, up: int) -> None:
        self._up = up
        self._lines = os.fdopen(down, "rb", closefd=False)

    def send(self, message: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._up, data):]

    def receive(self) -> dict[str, Any] | None:
        """The next message, waited for; None once the parent has closed its end."""
        line = self._lines.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Messages until the parent closes its end."""
        while (message := self.receive()) is not None:
            yield message


def connect() -> Connection:
    """Called first by a child's main. From then on it dies with its parent, even one that is killed by force."""
    down, up = (int(fd) for fd in os.environ.pop(_PIPE_VARIABLE).split(","))
    for fd in (down, up):
        os.set_inheritable(fd, False)  # compilers it starts must not hold the pipes open
    # Dumping the memory of a process with CUDA or LLVM in it takes longer than whatever it died of.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        pass  # not Linux: the closed pipe ends it after its current piece of work
    return Connection(down, up)
