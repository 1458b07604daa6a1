"""A kernel cache that is filled on one machine and used on another: what was found in it, and why the rest was not.

A compile-only run leaves a description beside the kernels it put into Triton's cache. Where the cache is carried to a
machine with a GPU, a sweep there compares that description with itself and counts what it had to compile.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from flash_sink_attn import kernel_cache
from sweeps.environment import kernel_source_hash

DESCRIPTION = "flash_sink_attn.json"


def facts(arch: int) -> dict[str, str]:
    """What the keys of our kernels are made of in this process and those it starts, by name."""
    return kernel_cache.key_facts(arch) | {"kernel source": kernel_source_hash()}


def describe(arch: int) -> Path:
    """Leaves the facts in the cache's directory, for whoever it is carried to. Returns the file's path."""
    here = facts(arch)
    path = Path(here["cache"]) / DESCRIPTION
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(here, indent=1) + "\n")
    os.replace(partial, path)
    return path


def carried(directory: Path) -> dict[str, str] | None:
    """What a compile-only run left in a cache's directory, None where there is nothing legible."""
    try:
        found = json.loads((directory / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return None
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else None


def report(hits: int, misses: int, arch: int) -> list[str]:
    """How many configurations a run found built in Triton's cache, and where some were missing, why.

    Args:
        hits, misses: configurations of ours whose kernels were all in the cache, and that had to be built.
        arch: compute capability that was compiled for.

    Returns:
        Lines for the end of a run; [] where nothing was built ahead.
    """
    if not hits + misses:
        return []
    lines = [f"kernel cache: {hits} of {hits + misses} configurations found"
             + (f", {misses} missing and built here" if misses else "")]
    here = facts(arch)
    before = carried(Path(here["cache"])) if misses else None
    return lines + ([] if before is None else [f"  {line}" for line in kernel_cache.differences(before, here)])
