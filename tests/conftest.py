"""Set before anything else is imported: the tests need no network, no display and one thread."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# The tests' tensors are tiny: a second thread only waits for the first, most of all beside a second test process.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from flash_sink_attn import _mode  # noqa: E402

import triton.language as tl  # noqa: E402  isort: skip  (the package sets how kernels run)
from triton.runtime import interpreter  # noqa: E402  isort: skip

torch.set_num_threads(1)

# How long an example takes says more of the machine's other work than of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@functools.cache
def _builtins(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, *where: Any) -> None:
    for name in _builtins(package):
        if tl.core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, *where)


# Triton's interpreter does the same, but for each call of one kernel function by another looks through all that
# triton.language holds for what is built in: a quarter of the time that the tests of the kernels took.
interpreter._patch_builtin = _patch_builtin


def pytest_sessionstart() -> None:
    if _mode.PROBLEM is not None:
        pytest.exit(_mode.PROBLEM, returncode=1)
