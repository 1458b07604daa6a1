"""Triton's cache of compiled kernels on disk: what it found, what it had to build, and what its keys are made of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

from flash_sink_attn._mode import triton


@dataclasses.dataclass
class Found:
    """Kernels that Triton was asked for and did not have in memory: read from the disk (hits), or compiled (misses)."""

    hits: int = 0
    misses: int = 0


@contextlib.contextmanager
def watch() -> Iterator[Found]:
    """Counts the kernels that Triton loads or compiles inside the ``with``, by the hook that Triton has for it.

    A kernel that this process has used already is in memory and counts as neither. A listener that was set before goes
    on hearing everything.
    """
    found = Found()
    earlier = triton.knobs.compilation.listener

    def listen(**event: Any) -> None:
        found.hits += event["cache_hit"]
        found.misses += not event["cache_hit"]
        if earlier is not None:
            earlier(**event)

    triton.knobs.compilation.listener = listen
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = earlier


def settle_key(kernel: Any) -> None:
    """Make the key of a kernel the same in every process, whatever was compiled there before.

    Triton hashes a kernel with the functions that it calls and the global constants that it reads. The constants of a
    called function are among them only if that function was hashed earlier, on its own account or another kernel's
    (``DependenciesFinder._update_hash`` merges them before it computes them). So here all of a module's functions are
    hashed together, from the first line to the last, after those of the modules that it imports functions from.
    """
    if _is_hashed(kernel):
        _settle_module(kernel.fn.__module__)


@functools.cache
def _settle_module(name: str) -> None:
    functions = [f for f in vars(sys.modules[name]).values() if _is_hashed(f)]
    for function in functions:
        if function.fn.__module__ != name:
            _settle_module(function.fn.__module__)
    own = [f for f in functions if f.fn.__module__ == name]
    for function in sorted(own, key=lambda f: int(f.fn.__code__.co_firstlineno)):
        _ = function.cache_key


def _is_hashed(x: Any) -> bool:
    """Whether it is a function of Triton's and not an interpreted one; asking x itself would compute its key."""
    return hasattr(type(x), "cache_key") and hasattr(getattr(x, "fn", None), "__code__")


def key_facts(arch: int) -> dict[str, str]:
    """All that enters the key of a cached kernel besides its own source, arguments and options.

    Two processes for which these agree find each other's kernels: Triton's key (``get_cache_key``) is a hash of the
    contents of Triton's package (its Python files and its library, which is built for one version of Python), of
    ptxas's version, the target's architecture, the kernel's source with all that it calls and its first line's number,
    the arguments' types, alignments and constants, the compile options, and the environment variables below. It
    contains no path; but the cache's index files do, so a cache is found only where it lay when it was filled.

    Args:
        arch: compute capability, 90 for Hopper.
    """
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version

    return {
        "triton": triton.__version__,
        "python": f"{platform.python_version_tuple()[0]}.{platform.python_version_tuple()[1]}"
                  f"{sysconfig.get_config_var('ABIFLAGS') or ''}",
        "machine": platform.machine(),
        "ptxas": get_ptxas_version(arch).strip().splitlines()[-1],
        "target": f"cuda:{arch}:32",
        "environment": ", ".join(f"{k}={v}" for k, v in sorted(get_cache_invalidating_env_vars().items())),
        "cache": os.path.realpath(triton.knobs.cache.dir),
    }


def differences(carried: dict[str, str], here: dict[str, str]) -> list[str]:
    """Why kernels of a cache that was filled elsewhere are not found here, one line per fact; [] = they should be."""
    return [f"{name}: the cache was filled with {carried.get(name, 'nothing known')!r}, here it is {value!r}"
            for name, value in here.items() if carried.get(name) != value]
