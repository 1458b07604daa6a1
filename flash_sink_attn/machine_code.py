"""Compiled kernels as machine code: Triton's own CUDA binary tools, and whether a kernel is what its source says."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
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


def shared_bytes(compiled: Any) -> int:
    """Shared memory of one program: what Triton asks for at the launch, and arrays that inline PTX declares, which
    Triton does not count."""
    arrays = re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]", compiled.asm.get("ptx", ""))
    return int(compiled.metadata.shared) + sum(map(int, arrays))


@functools.lru_cache(maxsize=2)
def disassemble(cubin: bytes) -> str:
    """What ``cuobjdump -res-usage -sass`` prints of a kernel; who asks twice in a row waits once.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError: it is not there, or cannot read the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool("cuobjdump"), "-res-usage", "-sass", str(path)], capture_output=True, text=True,
                              check=True).stdout


def kept(compiled: Any, name: str, version: bytes, make: Callable[[bytes], str]) -> str:
    """``make(cubin)``, looked up in Triton's cache beside the kernel, or made now and kept there.

    Args:
        name: of what is kept, the file's suffix.
        version: changes when ``make`` would say something else about the same machine code.
        make: what it raises is not kept.
    """
    cubin: bytes = compiled.asm["cubin"]
    path = Path(triton.knobs.cache.dir) / f"{hashlib.sha256(cubin + version).hexdigest()}.sink_attn_{name}"
    with contextlib.suppress(OSError):
        return path.read_text()
    text = make(cubin)
    with contextlib.suppress(OSError):  # without a cache that can be written it is made anew each time
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.write_text(text)
        made.replace(path)
    return text


def fault_of(compiled: Any) -> str | None:
    """Why a compiled kernel computes something else than its source says, None where nothing speaks for that.

    Looks for the one fault that is known, see :mod:`flash_sink_attn.sass_check`; only Hopper's matrix instructions can
    have it. A kernel that cannot be looked at counts as faulty. The verdict takes 0.1 to 0.3 s and is kept in Triton's
    cache beside the kernel, under the hash of the machine code and of the check itself.
    """
    if compiled.metadata.target.arch != 90:
        return None
    try:
        return kept(compiled, "check", _check_version(), lambda cubin: register_fault(disassemble(cubin)) or "") or None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"its machine code cannot be checked ({error})"


@functools.cache
def _check_version() -> bytes:
    return Path(sass_check.__file__).read_bytes()
