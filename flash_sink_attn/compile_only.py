"""Build kernels for a GPU that is not there: for a compile-only sweep, for CI, and to fill Triton's cache ahead.

The process must have been started with FLASH_SINK_ATTN_COMPILE_ONLY=1, so that it neither touches a GPU nor enters
the interpreter. The kernels go through the ordinary launcher with tensors on the "meta" device, so what is built (and
lands in Triton's on-disk cache) is what a call with the same shapes, strides and 16-byte aligned pointers will use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from flash_sink_attn import kernel_cache
from flash_sink_attn._mode import COMPILE_ONLY, triton
from flash_sink_attn.config import AnyConfig, Kernel, TileConfig, reproducible
from flash_sink_attn.kernels import launch
from flash_sink_attn.layout import Sequences
from flash_sink_attn.machine_code import disassemble, fault_of, kept, shared_bytes


class _AbsentGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)


@dataclasses.dataclass(frozen=True)
class Built:
    """What the compiler made of one kernel.

    Attributes:
        registers: per thread.
        spills: bytes of stack per thread (registers that did not fit).
        shared_bytes: shared memory of one program.
        hgmma: Hopper tensor-core instructions in the machine code.
        tma: copies by the tensor memory accelerator (UTMALDG, UTMASTG, UTMAREDG, UBLKCP) in it.
        local: loads from and stores to local memory (LDL, STL): what spilled, or an array that registers cannot index.
        mufu: instructions of the special function unit, most of them exp2.
        instructions: all of them but padding. These are counts in the code, not of what is executed.
        binary: hash of the machine code; equal for configurations that compile to the same kernel.
        cached: whether Triton's cache on disk had it, so that nothing was compiled.
        fault: why the machine code cannot be what the source says (flash_sink_attn.sass_check), None = no such sign.
    """

    registers: int
    spills: int
    shared_bytes: int
    hgmma: int
    tma: int
    local: int
    mufu: int
    instructions: int
    binary: str
    cached: bool
    fault: str | None


_COUNTED = {"hgmma": r"HGMMA", "tma": r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP", "local": r"LDL|STL", "mufu": r"MUFU"}


def _inspect(compiled: Any, cached: bool = False) -> Built:
    """Disassembling takes a quarter second, so what it told is kept beside the kernel."""
    facts = json.loads(kept(compiled, "facts", _code_version(), lambda cubin: json.dumps(_facts(disassemble(cubin)))))
    shared = shared_bytes(compiled)
    binary = hashlib.sha256(f"{facts.pop('code')}{shared}".encode()).hexdigest()[:16]
    return Built(**facts, shared_bytes=shared, cached=cached, fault=fault_of(compiled), binary=binary)


def _facts(text: str) -> dict[str, Any]:
    """What cuobjdump's text says: registers, spills and the counts of Built, and as ``code`` a hash of the code."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG and STACK, got {text[:200]!r}")
    sass = "\n".join(line.strip() for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line))
    counts = {name: len(re.findall(rf"\b(?:{names})\b", sass)) for name, names in _COUNTED.items()}
    return {"registers": int(usage[1]), "spills": int(usage[2]), **counts,
            "instructions": sass.count("\n") + 1 - len(re.findall(r"\bNOP\b", sass)),
            "code": hashlib.sha256(sass.encode()).hexdigest()}


@functools.cache
def _code_version() -> bytes:
    return Path(__file__).read_bytes()


_stubs_possible = True


def _build_launcher(compiled: Any) -> None:
    """Build Triton's C stub for launches of this kernel's signature, into the cache where a launch looks for it.

    It takes half a second of gcc, which otherwise the first launch pays, with the GPU waiting. It is linked with the
    driver's library: on a machine without a driver there is none, and nothing that could be launched.
    """
    global _stubs_possible
    if not _stubs_possible:
        return
    _stubs_possible = False  # until it has worked
    with contextlib.suppress(Exception):  # a Triton that does it in another way builds it at the first launch
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
        _stubs_possible = True


def set_target(arch: int) -> None:
    """Compile for compute capability ``arch`` (90 for Hopper) from now on.

    Raises:
        RuntimeError: the process was not started with FLASH_SINK_ATTN_COMPILE_ONLY=1.
    """
    if not COMPILE_ONLY:
        raise RuntimeError("compiling without a GPU: expected FLASH_SINK_ATTN_COMPILE_ONLY=1 in the environment before "
                           "flash_sink_attn is imported")
    triton.runtime.driver.set_active(_AbsentGpu(arch))


def compile_kernel(
    kernel: Kernel, config: AnyConfig, *, dtype: torch.dtype, batch: int, seqlen_q: int, seqlen_k: int, heads_q: int,
    heads_kv: int, head_dim: int, head_dim_v: int, window: int | None, varlen: bool = False, sinks: bool = True,
    arch: int = 90,
) -> Built:
    """Build one kernel as a call with contiguous tensors of this shape would use it.

    ``seqlen_q`` and ``seqlen_k`` are per sequence, or total token counts when ``varlen``. Raises what Triton raises.
    """
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    leading_q, leading_k = ((seqlen_q,), (seqlen_k,)) if varlen else ((batch, seqlen_q), (batch, seqlen_k))
    q, k, v = (empty(*leading_q, heads_q, head_dim), empty(*leading_k, heads_kv, head_dim),
               empty(*leading_k, heads_kv, head_dim_v))
    o = empty(*leading_q, heads_q, head_dim_v)
    cu = empty(batch + 1, dtype=torch.int32) if varlen else None
    lse = empty(*((heads_q, seqlen_q) if varlen else (batch, heads_q, seqlen_q)), dtype=torch.float32)
    sink = empty(heads_q, dtype=torch.float32) if sinks else None
    sequences = Sequences(batch, seqlen_q, seqlen_k, cu)
    call: dict[str, Any] = {"sequences": sequences, "window": window, "scale": head_dim**-0.5, "config": config}
    set_target(arch)
    with kernel_cache.watch() as found:
        if isinstance(config, TileConfig):
            rows = launch.row_statistics(q, sequences)
            partials = None
            if sinks and kernel != "fwd":
                partials = launch.sink_partials(q, k, sequences, config)
            if kernel == "fwd":
                compiled = launch.forward(q, k, v, sink, o, lse, **call)
            elif kernel == "bwd_dq":
                compiled = launch.backward_dq(q, k, v, sink, o, lse, o, None, q, rows, partials, **call)
            else:
                compiled = launch.backward_dkdv(q, k, v, rows, o, k, v, partials, sink, **call)
        elif kernel == "hopper_fwd":
            forward = importlib.import_module("flash_sink_attn.hopper.launch_forward").forward
            compiled = forward(q, k, v, sink, o, lse, **call)
        else:
            backward = importlib.import_module("flash_sink_attn.hopper.launch_backward").backward
            compiled = backward(q, k, v, sink, o, lse, o, None, q, k, v, sink, deterministic=reproducible(config),
                                **call)
    _build_launcher(compiled)
    return _inspect(compiled, cached=found.misses == 0)
