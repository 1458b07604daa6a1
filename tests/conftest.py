"""Set before anything else is imported: the tests need no network, no display and one thread."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# The tests' tensors are tiny: a second thread only waits for the first, most of all beside a second test process.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from flash_sink_attn import _mode  # noqa: E402

torch.set_num_threads(1)

# How long an example takes says more of the machine's other work than of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_sessionstart() -> None:
    if _mode.PROBLEM is not None:
        pytest.exit(_mode.PROBLEM, returncode=1)
