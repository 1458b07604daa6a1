"""What a call costs the host: from entering the public function to having queued its kernels.

The calls of a batch are made one after another without waiting for the device, and the clock of the host is read around
the batch. A batch is short enough for the device's queue to hold all of its launches; where the device was the slower
one all the same, the time until it was done says so. What autograd does is part of it: its bookkeeping in the forward,
its engine in the backward.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.presets import MODELS

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]

LIMIT_US = 40.0     # of a forward with what autograd notes down for its backward
BATCHES, CALLS = 40, 100    # at most three launches a call: a device queues 1024
_SEQLEN = 256       # short, so that the device is never the slower one
_MODEL = "gpt-oss"
_WINDOW = 128


@dataclasses.dataclass(frozen=True)
class HostTime:
    """Of one kind of call, in us of host time per call.

    Attributes:
        name: what was called.
        median, low, high: over the batches; low and high are the tenth and the ninetieth percentile.
        device: what the device took per call, from the first to the last of a batch.
        impls: which implementation the call used, by pass.
    """

    name: str
    median: float
    low: float
    high: float
    device: float
    impls: str

    @property
    def note(self) -> str:
        """What a reader must know, "" = nothing."""
        return "the device was the slower one" if self.device > 1.2 * self.median else ""

    def row(self) -> dict[str, Any]:
        return {"call": self.name, "host_us": self.median, "host_us_p10": self.low, "host_us_p90": self.high,
                "device_us": self.device, "impl": self.impls, "note": self.note}


def host_times(batch: Call, synchronize: Call, calls: int, batches: int = BATCHES,
               clock: Callable[[], float] = time.perf_counter) -> tuple[list[float], list[float]]:
    """Host time per call and time until the device was done per call, in us, of every batch.

    Args:
        batch: performs ``calls`` calls.
        synchronize: waits for the device.
    """
    host, device = [], []
    for number in range(batches + 3):   # the first ones warm up
        synchronize()
        begin = clock()
        batch()
        queued = clock()
        synchronize()
        if number >= 3:
            host.append((queued - begin) / calls * 1e6)
            device.append((clock() - begin) / calls * 1e6)
    return host, device


def measured(name: str, call: Call, synchronize: Call, impls: str = "", calls: int = CALLS) -> HostTime:
    """Host time of a call that has been made before."""
    def batch() -> None:
        for _ in range(calls):
            call()

    host, device = host_times(batch, synchronize, calls)
    tenths = statistics.quantiles(host, n=10)
    return HostTime(name, statistics.median(host), tenths[0], tenths[-1], statistics.median(device), impls)


def subjects(device: torch.device) -> Iterator[tuple[str, Call, str]]:
    """The calls: name, the call itself, and the implementations it uses; each has run once."""
    import torch

    from flash_sink_attn import explain, flash_sink_attn_func, flash_sink_attn_varlen_func
    from flash_sink_attn.config import IMPLS

    shape, sequences = MODELS[_MODEL], 4
    torch.manual_seed(0)

    def some(heads: int, *leading: int) -> torch.Tensor:
        return torch.randn(*leading, heads, shape.head_dim, dtype=torch.bfloat16, device=device)

    sinks = torch.randn(shape.heads_q, device=device)
    cu = torch.arange(0, _SEQLEN * (sequences + 1), _SEQLEN, dtype=torch.int32, device=device)
    for kind, leading in (("fixed", (1, _SEQLEN)), ("varlen", (sequences * _SEQLEN,))):
        x = [some(shape.heads_q, *leading), *(some(shape.heads_kv, *leading) for _ in range(2)), sinks]
        rest: tuple[Any, ...] = (_WINDOW,) if kind == "fixed" else (cu, _WINDOW)
        function: Any = flash_sink_attn_func if kind == "fixed" else flash_sink_attn_varlen_func
        grads = [t.clone().requires_grad_() for t in x]
        do = torch.randn_like(x[0])
        # tensors at addresses that no recent call had, as in a step that allocates anew
        moving = [[t.clone() for t in x] for _ in range(300)]
        for impl in (*IMPLS, None):
            options: dict[str, Any] = {"impl": impl}
            try:
                found = explain(*x, *rest, **options)
            except ValueError:
                continue    # this implementation cannot run here
            impls = ", ".join(f"{s.pass_} {s.impl}" for s in found.selections)
            if impl is None and len({s.impl for s in found.selections}) == 1:
                continue    # one of those measured already
            turn: Iterator[Any] = iter(())

            def without() -> None:
                with torch.no_grad():
                    function(*x, *rest, **options)  # noqa: B023

            def forward() -> None:
                function(*grads, *rest, **options)  # noqa: B023

            def both() -> None:
                torch.autograd.grad(function(*grads, *rest, **options), grads, do)  # noqa: B023

            def moved() -> None:
                nonlocal turn
                given: Any = next(turn, None)
                if given is None:
                    turn = iter(moving)  # noqa: B023
                    given = next(turn)
                with torch.no_grad():
                    function(*given, *rest, **options)  # noqa: B023

            who = impl or "chosen"
            for what, call in (("forward, no gradients", without), ("forward", forward),
                               ("forward and backward", both), ("forward, new addresses", moved)):
                call()
                yield f"{kind}, {who}, {what}", call, impls


def run_host_times(device: torch.device, say: Callable[[str], object]) -> list[HostTime]:
    """Measures every subject on a CUDA device."""
    import torch

    found = []
    for name, call, impls in subjects(device):
        found.append(measured(name, call, lambda: torch.cuda.synchronize(device), impls))
        say(f"{name}: {found[-1].median:.1f} us")
    return found


def markdown(found: Sequence[HostTime], facts: Mapping[str, Any]) -> str:
    """The measurements as text."""
    forward = [one for one in found if one.name.endswith(", forward")]
    lines = [
        "# Host time per call", "", ", ".join(f"{name} {value}" for name, value in facts.items() if value), "",
        f"{_MODEL} heads, sequences of {_SEQLEN} tokens, window {_WINDOW}; us of host time per call, the median of "
        f"{BATCHES} batches of {CALLS} calls. {sum(one.median <= LIMIT_US for one in forward)} of {len(forward)} "
        f"forwards with autograd's bookkeeping are within {LIMIT_US:g} us.", "",
        "| call | host us | 10% | 90% | until the device was done | uses | |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |"]
    lines += [f"| {one.name} | {one.median:.1f} | {one.low:.1f} | {one.high:.1f} | {one.device:.1f} | {one.impls} | "
              f"{one.note} |" for one in found]
    return "\n".join(lines) + "\n"


def write_host_times(folder: Path, found: Sequence[HostTime], facts: Mapping[str, Any]) -> None:
    """Writes hosttime.csv and hosttime.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "hosttime.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0].row()), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.2f}" if isinstance(value, float) else value
                          for name, value in one.row().items()} for one in found)
    (folder / "hosttime.md").write_text(markdown(found, facts))
