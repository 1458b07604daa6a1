"""Calls whose device time is compared with the hardware's own: kernels of ours and of torch, from 15 us to 20 ms.

``python -m sweeps.subjects COUNT NAME ...`` performs each of them COUNT times for a profiler that watches from outside,
which is told by cudaProfilerStart and cudaProfilerStop when to look.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.cases import Case
from sweeps.gate import gate_inputs
from sweeps.measure import Call, DeviceTimer
from sweeps.ours import TRITON
from sweeps.presets import MODELS

if TYPE_CHECKING:
    import torch

HEAT_MS = 100.0     # of calls before the first one that counts, so that clocks and power are those of a card at work


def _ours(model: str, pass_: str, seqlen: int, window: int | None) -> Callable[[torch.device], Call]:
    preset = MODELS[model]
    case = Case(pass_, "bfloat16", 1, seqlen, seqlen, preset.heads_q, preset.heads_kv, preset.head_dim,
                preset.head_dim_v, window, model=model)

    def make(device: torch.device) -> Call:
        return TRITON.prepare(case, {}, gate_inputs(case, device)).run

    return make


def _matmul(size: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        import torch

        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        out = torch.empty_like(a)

        def call() -> None:
            torch.mm(a, b, out=out)

        return call

    return make


def _add(mib: int) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        import torch

        source = torch.ones(mib << 18, dtype=torch.float32, device=device)
        target = torch.empty_like(source)

        def call() -> None:
            torch.add(source, 1.0, out=target)  # copy_ need not be a kernel

        return call

    return make


def _smallest(device: torch.device) -> Call:
    import torch

    one = torch.zeros(1, device=device)

    def call() -> None:
        one.add_(1.0)

    return call


SMALLEST = "one-element add"
# The smallest kernel is there for the offset of a pair of events, not for the verdict: it is all offset.
SUBJECTS: dict[str, Callable[[Any], Call]] = {
    SMALLEST: _smallest,
    "fwd gpt-oss 1024 w128": _ours("gpt-oss", "fwd", 1024, 128),
    "bwd_dq gpt-oss 2048 w128": _ours("gpt-oss", "bwd_dq", 2048, 128),
    "bwd gpt-oss 1024 w128": _ours("gpt-oss", "bwd", 1024, 128),
    "fwd gpt-oss 8192 w128": _ours("gpt-oss", "fwd", 8192, 128),
    "bwd_dkdv gpt-oss 8192 w128": _ours("gpt-oss", "bwd_dkdv", 8192, 128),
    "fwd gpt-oss 4096 causal": _ours("gpt-oss", "fwd", 4096, None),
    "fwd llama-70b 8192 causal": _ours("llama-70b", "fwd", 8192, None),
    "bwd llama-70b 8192 causal": _ours("llama-70b", "bwd", 8192, None),
    "bwd_dkdv llama-70b 16384 causal": _ours("llama-70b", "bwd_dkdv", 16384, None),
    "matmul 1024": _matmul(1024),
    "matmul 4096": _matmul(4096),
    "matmul 16384": _matmul(16384),
    "add 16 MiB": _add(16),
    "add 1024 MiB": _add(1024),
}


def heat(timer: DeviceTimer, call: Call, milliseconds: float = HEAT_MS) -> None:
    """Performs the call for a while, so that what follows finds the card at work."""
    begin = time.perf_counter()
    while (time.perf_counter() - begin) * 1e3 < milliseconds:
        call()
        timer.synchronize()


def perform(names: Sequence[str], count: int) -> None:
    """Each call ``count`` times with a flushed L2 cache, each between cudaProfilerStart and cudaProfilerStop.

    The profiler sees a spinning kernel before the first time, so that it can be told whose kernels follow.
    """
    import torch

    device = torch.device("cuda", 0)
    timer = DeviceTimer(device)
    for name in names:
        call = SUBJECTS[name](device)
        call()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1000)
        timer.synchronize()
        torch.cuda.profiler.stop()
        for _ in range(count):
            heat(timer, call, HEAT_MS / 4)
            timer.flush()
            timer.synchronize()
            torch.cuda.profiler.start()
            call()
            timer.synchronize()
            torch.cuda.profiler.stop()
        del call
        torch.cuda.empty_cache()


if __name__ == "__main__":
    perform(sys.argv[2:], int(sys.argv[1]))
