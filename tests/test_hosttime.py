"""Host time per call: what is timed, what is called, and how it is written down."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sweeps.cli
from flash_sink_attn import dispatch
from sweeps import hosttime
from sweeps.hosttime import HostTime, host_times, markdown, measured, subjects, write_host_times
from tests import fake_kernels


class Clock:
    """Time that passes only where somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queued = 0.0

    def call(self) -> None:
        self.now += 12e-6
        self.queued += 30e-6

    def synchronize(self) -> None:
        self.now, self.queued = max(self.now, self.now + self.queued - 12e-6 * 10), 0.0

    def __call__(self) -> float:
        return self.now


def test_host_time_is_until_the_calls_are_queued() -> None:
    clock = Clock()
    host, device = host_times(lambda: [clock.call() for _ in range(10)], clock.synchronize, 10, batches=4, clock=clock)
    assert host == pytest.approx([12.0] * 4) and device == pytest.approx([30.0] * 4)


def test_a_device_that_is_slower_is_said() -> None:
    fast, slow = HostTime("fixed, triton, forward", 20.0, 19.0, 22.0, 21.0, "fwd triton"), HostTime(
        "varlen, triton, forward", 41.0, 40.0, 45.0, 80.0, "fwd triton")
    text = markdown([fast, slow], {"gpu": "a card", "driver": None})
    assert "1 of 2 forwards with autograd's bookkeeping are within 40 us" in text and "gpu a card" in text
    assert "| fixed, triton, forward | 20.0 | 19.0 | 22.0 | 21.0 | fwd triton |  |" in text
    assert "80.0 | fwd triton | the device was the slower one |" in text


def test_it_is_written(tmp_path: Path) -> None:
    one = measured("nothing", lambda: None, lambda: None, calls=3)
    write_host_times(tmp_path / "run", [one], {"gpu": "a card"})
    (row,) = csv.DictReader((tmp_path / "run" / "hosttime.csv").open())
    assert row["call"] == "nothing" and float(row["host_us"]) < 1e4
    assert "| nothing |" in (tmp_path / "run" / "hosttime.md").read_text()


def test_every_subject_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = fake_kernels.install(monkeypatch)
    monkeypatch.setattr(hosttime, "_SEQLEN", 16)
    dispatch.forget()
    names = []
    for name, call, impls in subjects(torch.device("cpu")):
        call()
        names.append(name)
        assert "fwd triton" in impls
    dispatch.forget()
    ends = ("forward, no gradients", "forward", "forward and backward", "forward, new addresses")
    assert names == [f"{kind}, triton, {end}" for kind in ("fixed", "varlen") for end in ends]
    assert [len(kernel.first) for kernel in kernels.values()] == [2, 2, 2]     # all others were replayed


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_it_wants_a_gpu() -> None:
    result = CliRunner().invoke(sweeps.cli.app, ["hosttime"])
    assert result.exit_code == 3 and "hosttime: expected a CUDA device" in result.output
