"""Kernels that are launched without a GPU: what arrives at the driver is noted, and nothing is computed.

They stand in for Triton's kernels in the launchers, so that everything on the host runs as it does on a GPU, from the
public functions down to the C function that Triton generates for a launch.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_sink_attn import replay
from flash_sink_attn.kernels import launch


class Compiled:
    """As much of Triton's CompiledKernel as launching needs; ``direct`` and ``listened`` are its two ways in."""

    packed_metadata = (4, 1, 0)
    function = 1234
    n_regs, n_spills = 128, 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.metadata = types.SimpleNamespace(tensordesc_meta=None, shared=1000)
        self.listened: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.listened.append((grid, *arguments))


class Kernel:
    """As much of a Triton kernel; compiled once per set of constants, like the real one."""

    def __init__(self, like: Any) -> None:
        self.__name__ = like.__name__
        self.arg_names = like.arg_names
        self.compiled: dict[tuple[Any, ...], Compiled] = {}
        self.first: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(**arguments: Any) -> Compiled:
            self.first.append(arguments)
            key = tuple((k, v) for k, v in arguments.items() if k.isupper() and isinstance(v, (int, bool)))
            return self.compiled.setdefault(key, Compiled(self.__name__))

        return run

    def warmup(self, **arguments: Any) -> Compiled:
        return Compiled(self.__name__)


def needs_no_gpu() -> None:
    """Skips a test that calls the functions on CPU tensors, which they refuse where there is a GPU."""
    if torch.cuda.is_available():
        pytest.skip("on CPU tensors, which only a machine without a GPU takes")


def install(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """Replaces the portable kernels; by their names."""
    needs_no_gpu()
    found = {}
    for name in ("fwd_kernel", "dq_kernel", "dkdv_kernel"):
        found[name] = Kernel(getattr(launch, name))
        monkeypatch.setattr(launch, name, found[name])
    monkeypatch.setattr(launch, "INTERPRETING", False)
    monkeypatch.setattr(launch, "fault_of", lambda compiled: None)
    return found


def install_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the replay find the short way to the driver in a :class:`Compiled`: its C function notes what it is given,
    and a tensor map is its address as text."""
    def parts(compiled: Compiled) -> replay.Launcher:
        return replay.Launcher(lambda *arguments: compiled.direct.append(arguments), False, False, lambda: 77,
                               lambda descriptor, number: (lambda address: f"map at {address}"))

    monkeypatch.setattr(replay, "launcher_of", parts)


def tensors(
    batch: int = 1, seqlen: int = 64, heads_q: int = 4, heads_kv: int = 2, head_dim: int = 64, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and sinks."""
    q = torch.randn(batch, seqlen, heads_q, head_dim, dtype=torch.bfloat16, **options)
    k, v = (torch.randn(batch, seqlen, heads_kv, head_dim, dtype=torch.bfloat16, **options) for _ in range(2))
    return q, k, v, torch.randn(heads_q, **options)
