"""An implementation whose kernels fail on the GPU in earnest, by the ``do`` of their config. Needs CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from sweeps.cases import Case
from sweeps.implementation import Inputs, Prepared
from tests.fakes import Fake

FAR = 1 << 45  # elements: an address that nothing of this process has


@triton.jit
def _write_far_away(x, offset):
    tl.store(x + offset, 1.0)


@triton.jit(debug=True)
def _assert_positive(x):
    tl.device_assert(tl.load(x) > 0.0, "expected a positive number")


@triton.jit
def _wait_for_ever(flag, out):
    value = tl.load(flag, volatile=True)
    while value == 0:
        value = tl.load(flag, volatile=True)
    tl.store(out, value)


class Faulty(Fake):
    """Fake whose faults are the device's."""

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        prepared, what = super().prepare(case, {**config, "do": "ok"}, inputs), config.get("do", "ok")
        right = prepared.run
        hoard: list[torch.Tensor] = []

        def run() -> None:
            x = torch.zeros(2, dtype=torch.float32, device=inputs.q.device)
            if what == "illegal":
                _write_far_away[(1,)](x, FAR)
            elif what == "assert":
                _assert_positive[(1,)](x)
            elif what == "endless":
                flags = x.to(torch.int32)
                _wait_for_ever[(1,)](flags, flags[1:])
            elif what == "memory":
                while True:
                    hoard.append(torch.empty(1 << 30, dtype=torch.int8, device=inputs.q.device))
            right()

        prepared.run = run
        return prepared


def make(options: Mapping[str, Any]) -> Faulty:
    return Faulty(options)
