"""Compiled kernels as machine code: Triton's own CUDA binary tools, and whether a kernel is what its source says."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from flash_sink_attn import sass_check
from flash_sink_attn._mode import triton
from flash_sink_attn.sass_check import register_fault


def tool(name: str) -> str:
    """Path of a CUDA binary tool in Triton's package.

    Raises:
        FileNotFoundError: this Triton does not bring it.
    """
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name}: expected in Triton's package at {path}")
    return str(path)


def disassemble(cubin: bytes) -> str:
    """What ``cuobjdump -res-usage -sass`` prints of a kernel.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: it is not there, or cannot read the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool("cuobjdump"), "-res-usage", "-sass", str(path)], capture_output=True, text=True,
                              check=True).stdout


def fault_of(compiled: Any) -> str | None:
    """Why a compiled kernel computes something else than its source says, None where nothing speaks for that.

    Looks for the one fault that is known, see :mod:`flash_sink_attn.sass_check`; only Hopper's matrix instructions can
    have it. A kernel that cannot be looked at counts as faulty. The verdict takes 0.1 to 0.3 s and is kept in Triton's
    cache beside the kernel, under the hash of the machine code and of the check itself.
    """
    if compiled.metadata.target.arch != 90:
        return None
    cubin: bytes = compiled.asm["cubin"]
    verdict = Path(triton.knobs.cache.dir) / f"{hashlib.sha256(cubin + _check_version()).hexdigest()}.sink_attn_check"
    with contextlib.suppress(OSError):
        return verdict.read_text() or None
    try:
        fault = register_fault(disassemble(cubin))
    except (OSError, subprocess.CalledProcessError) as error:
        return f"its machine code cannot be checked ({error})"
    with contextlib.suppress(OSError):  # without a cache that can be written it is found anew each time
        made = verdict.with_suffix(f".{os.getpid()}")
        made.write_text(fault or "")
        made.replace(verdict)
    return fault


@functools.cache
def _check_version() -> bytes:
    return Path(sass_check.__file__).read_bytes()
