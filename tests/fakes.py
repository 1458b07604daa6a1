"""An implementation that does what its config says, for every way a trial can end. Loaded in the worker by dotted path.

Config keys: ``do`` (default "ok"), ``n`` (tells trials apart), ``binary`` and ``shared_bytes`` (what compile returns).
Options: ``log``, a file that gets one line per prepared trial (and beside it, as .pid, the worker's process id);
``gone``, a reason to be unavailable; ``version``.
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
        if what == "compile_hang":
            time.sleep(HANG_S)
        resources = {"registers": 64, "spills": 0, "shared_bytes": config.get("shared_bytes", 1024)}
        return resources | {"binary": config["binary"]} if "binary" in config else {}

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        if "log" in self.options:
            Path(self.options["log"]).with_suffix(".pid").write_text(str(os.getpid()))
            with Path(self.options["log"]).open("a") as log:  # last: whoever waits for this line finds the rest written
                log.write(f"{config.get('n')}\n")
        what = config.get("do", "ok")
        if what == "out_of_resources":
            raise OutOfResources("shared memory")
        o, lse = attention_reference(inputs.q, inputs.k, inputs.v, inputs.sinks, window=inputs.window)
        buffers = {"o": o.to(inputs.q.dtype), "lse": lse.to(torch.float32)}
        calls = []

        def poison() -> None:
            for buffer in buffers.values():
                buffer.fill_(float("nan"))

        def run() -> None:
            calls.append(None)
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
