"""An implementation that does what its config says, for every way a trial can end. Loaded in the worker by dotted path.

Config keys: ``do`` (default "ok"; what ends in "_elsewhere" is done on further placements of the inputs only), ``n``
(tells trials apart), ``binary`` and ``shared_bytes`` (what compile returns).
Options: ``log``, a file that gets one line per prepared trial (and beside it, as .pid, or .other with the option
``other``, the worker's process id);
``gone``, a reason to be unavailable; ``version``; ``meet``, a folder in which the workers of a run wait for each other.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from flash_sink_attn.reference import attention_reference
from sweeps.cases import Case
from sweeps.implementation import Inputs, Prepared

HANG_S = 600.0
MEET_S = 120.0


def wait_for(file: Path) -> None:
    end = time.monotonic() + MEET_S
    while not file.exists():
        if time.monotonic() > end:
            raise RuntimeError(f"nobody came to {file.name}")
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class OutOfResources(Exception):
    """Named like Triton's."""


class Fake:
    is_flash = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.name = "fake"
        self.options = dict(options)

    def unavailable(self) -> str | None:
        return self.options.get("gone")

    def unsupported(self, case: Case) -> str | None:
        return "no varlen here" if case.varlen else None

    def versions(self) -> dict[str, str]:
        return {"fake": str(self.options.get("version", 1))}

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        return [{"do": "ok"}]

    def rejected(self, case: Case, config: Mapping[str, Any], arch: int) -> str | None:
        return "the tile does not fit" if config.get("do") == "rejected" else None

    def compile(self, case: Case, config: Mapping[str, Any], arch: int) -> dict[str, Any]:
        what = config.get("do")
        if what == "compile_error":
            raise RuntimeError("PassManager::run failed")
        if what == "compile_abort":
            os.abort()
        if what == "compile_kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "compile_exit":
            os._exit(7)
        if what == "compile_hang":
            time.sleep(HANG_S)
        resources = {"registers": 64, "spills": 0, "shared_bytes": config.get("shared_bytes", 1024)}
        return resources | {"binary": config["binary"]} if "binary" in config else {}

    def _beside(self, suffix: str) -> Path:
        """A file beside the log."""
        return Path(self.options["log"]).with_suffix(f".{suffix}")

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        if "log" in self.options:
            self._beside("other" if "other" in self.options else "pid").write_text(str(os.getpid()))
            with Path(self.options["log"]).open("a") as log:  # last: whoever waits for this line finds the rest written
                log.write(f"{config.get('n')}\n")
        what = config.get("do", "ok")
        if what.endswith("_elsewhere"):
            what = what.removesuffix("_elsewhere") if inputs.q.storage_offset() else "ok"
        if what == "meet":  # a peer that compiles until somebody else is in the middle of its timing
            (Path(self.options["meet"]) / "preparing").touch()
            wait_for(Path(self.options["meet"]) / "timing")
        if what == "oom_beside" and not self._beside("tried").exists():  # first waits for somebody to be beside
            self._beside("tried").touch()
            wait_for(self._beside("other"))
        if what == "met":
            wait_for(Path(self.options["meet"]) / "preparing")
        if what == "out_of_resources":
            raise OutOfResources("shared memory")
        o, lse = attention_reference(inputs.q, inputs.k, inputs.v, inputs.sinks, window=inputs.window)
        buffers = {"o": o.to(inputs.q.dtype), "lse": lse.to(torch.float32)}
        calls = []

        def poison() -> None:
            for buffer in buffers.values():
                buffer.fill_(float("nan"))

        def run() -> None:
            if "meet" in self.options:
                with (Path(self.options["meet"]) / "runs").open("a") as file:
                    begin = time.monotonic()
                    time.sleep(0.005)
                    file.write(f"{os.getpid()} {begin} {time.monotonic()}\n")
            calls.append(None)
            if what == "met" and len(calls) > 1:  # the second call is the first one of the timing
                time.sleep(0.02)
                (Path(self.options["meet"]) / "timing").touch()
            if what == "oom_beside" and is_running(int(self._beside("other").read_text())):
                raise torch.OutOfMemoryError("CUDA out of memory: somebody else has it")
            if what in ("oom_second", "oom_later"):  # the second time only; from then on
                turn = Path(self.options["log"]).read_text().split().count(str(config["n"]))
                if turn == 2 or what == "oom_later" and turn > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            if what == "oom":
                torch.empty(1 << 50, device=inputs.q.device)
            if what == "runtime_error":
                raise RuntimeError("device-side assert")
            if what == "device_assert":
                torch.zeros(1, device=inputs.q.device)[torch.tensor([9], device=inputs.q.device)].cpu()
            if what == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "abort":
                sys.stderr.write("last words\n")
                sys.stderr.flush()
                os.abort()
            if what == "hang":
                time.sleep(HANG_S)
            if what == "sleep":
                time.sleep(config["seconds"])
            if what == "chatter":
                print('{"event": "row"}', flush=True)
            if what == "slow_once" and Path(self.options["log"]).read_text().split().count(str(config["n"])) == 1:
                time.sleep(HANG_S)
            if what == "stale":  # leaves what was there before, which is right
                return
            buffers["o"].copy_(o)
            buffers["lse"].copy_(lse)
            if what == "incorrect" or (what == "drifts" and len(calls) > 1):
                buffers["o"].mul_(1.25)

        return Prepared(run=run, outputs=lambda: buffers, poison=poison, resources={"registers": 80})


def make(options: Mapping[str, Any]) -> Fake:
    return Fake(options)
