"""The comparison with the hardware's clocks, on made-up traces and a device whose true times are known."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sweeps import agreement, cli, subjects
from sweeps.agreement import (
    Agreement,
    add_ncu,
    calls_of,
    compare,
    markdown,
    ncu_calls_ms,
    ncu_command,
    near,
    write_agreement,
)


def event(ts: float, dur: float, name: str, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


SPIN, FLUSH = "at::cuda::(anonymous namespace)::spin_kernel(long)", "Memset (Device)"


def test_a_trace_falls_into_calls_at_the_spins() -> None:
    events = [
        event(0, 9, "_fwd"), event(10, 40, FLUSH, "gpu_memset"), event(50, 100, SPIN),
        event(151, 20, "_bwd_dq"), event(172.5, 30, "_bwd_dkdv"),
        event(203, 40, FLUSH, "gpu_memset"), event(243, 100, SPIN), event(344, 21, "_bwd_dq"),
        event(366, 31, "_bwd_dkdv"), event(5, 500, "cudaLaunchKernel", "cuda_runtime"),
        {"ph": "s", "cat": "ac2g", "name": "x", "ts": 1}]
    found = calls_of({"traceEvents": events[::-1]})
    assert found == [[(0.151, 0.02), (0.1725, 0.03)], [(0.344, 0.021), (0.366, 0.031)]]
    assert calls_of({"traceEvents": []}) == []


class Device:
    """Kernels of known length with a gap between them, and a pair of events that shows ``offset`` more."""

    def __init__(self, kernels_ms: Sequence[float], gap_ms: float = 0.001, offset_ms: float = 0.0005) -> None:
        self.kernels, self.gap, self.offset = kernels_ms, gap_ms, offset_ms
        self.events: list[dict[str, Any]] = []
        self.now = 0.0

    def warm_up(self, call: Any, warmup_ms: float) -> tuple[float, float]:
        return 0.02, sum(self.kernels)

    def capture(self, call: Any, count: int = 1) -> Any:
        return call

    def synchronize(self) -> None:
        pass

    def work(self, ms: float, name: str, cat: str = "kernel") -> None:
        self.events.append(event(1e3 * self.now, 1e3 * ms, name, cat))
        self.now += ms

    def call(self) -> None:
        for ms in self.kernels:
            self.work(ms, "_kernel")
            self.now += self.gap

    def batch(self, calls: Sequence[Any], spin_ms: float) -> tuple[list[tuple[float, bool]], None]:
        out = []
        for call in calls:
            self.work(0.04, FLUSH, "gpu_memset")
            self.work(spin_ms, SPIN)
            begin = self.now
            call()
            ended = self.now - self.gap if self.now > begin else begin
            out.append((ended - begin + self.offset, False))
        return out, None

    def profile(self, work: Callable[[], None]) -> Mapping[str, Any]:
        self.events = []
        work()
        return {"traceEvents": self.events}


@pytest.fixture(autouse=True)
def no_heat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "heat", lambda timer, call: call())


def compared(device: Device) -> Agreement:
    return compare("a call", device.call, device, device.profile)  # type: ignore[arg-type]


def test_the_same_launches_are_seen_by_all_clocks() -> None:
    found = compared(Device([0.1]))
    assert found.ours_ms == pytest.approx(0.1005) == found.graph_ms == found.profiled_ms
    assert found.cupti_ms == pytest.approx(0.1) == found.cupti_span_ms and found.kernels == 1
    assert found.agrees() and found.ncu_ms is None and found.samples >= 15


def test_gaps_between_kernels_are_in_the_span_and_not_in_the_sum() -> None:
    found = compared(Device([0.02, 0.03], gap_ms=0.002))
    assert found.kernels == 2 and found.cupti_ms == pytest.approx(0.05)
    assert found.cupti_span_ms == pytest.approx(0.052) and found.ours_ms == pytest.approx(0.0525)
    assert found.agrees() and not near(found.ours_ms, found.cupti_ms)  # 2.5 us and 5% more than the kernels alone


@pytest.mark.parametrize(("kernel", "offset", "agrees"), [
    (0.020, 0.0009, True), (0.020, 0.0011, False), (5.0, 0.09, True), (5.0, 0.11, False), (5.0, -0.11, False)])
def test_within_two_percent_or_a_microsecond(kernel: float, offset: float, agrees: bool) -> None:
    assert compared(Device([kernel], offset_ms=offset)).agrees() is agrees


def test_nsight_compute_has_a_vote_where_it_was_asked() -> None:
    asked: list[Sequence[str]] = []

    def says(ms: dict[str, float], note: str = "") -> Callable[[Sequence[str]], tuple[dict[str, float], str]]:
        return lambda names: (asked.append(names), (ms, note))[1]

    both = [compared(Device([1.0])), dataclasses.replace(compared(Device([1.0])), name="other")]
    near, other = add_ncu(both, ["a call"], says({"a call": 1.01}))
    assert near.agrees() and near.ncu_ms == 1.01 and other.ncu_ms is None and asked == [["a call"]]
    far = dataclasses.replace(both[0], cupti_ms=1.1, cupti_span_ms=1.1)
    assert not add_ncu([far], ["a call"], says({"a call": 1.05}))[0].agrees()
    assert add_ncu([far], ["a call"], says({"a call": 1.01}))[0].agrees()  # either of them is the hardware's
    silent, other = add_ncu(both, ["a call"], says({}, "ncu: no permission"))
    assert silent.agrees() and silent.note == "ncu: no permission" and other.note == ""


def test_a_profile_without_kernels_is_an_error() -> None:
    device = Device([])
    with pytest.raises(ValueError, match="a call: expected kernels in every call"):
        compared(device)


NCU = '''==PROF== Connected to process 1
==PROF== Profiling "_bwd_dq" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Kernel Name","gpu__time_duration.sum"
"","","","{unit}"
"0","1","void at::cuda::spin_kernel(long)","77"
"0","1","_bwd_dq","{a}"
"1","1","_bwd_dkdv","1,000"
"2","1","_bwd_dq","{a}"
"3","1","_bwd_dkdv","1,200"
==PROF== Disconnected
'''


@pytest.mark.parametrize(("unit", "scale"), [("ns", 1e-6), ("nsecond", 1e-6), ("usecond", 1e-3), ("us", 1e-3)])
def test_nsight_computes_table_is_read(unit: str, scale: float) -> None:
    table = NCU.format(unit=unit, a="2,000")
    (found,) = ncu_calls_ms(table, 2)
    assert found == pytest.approx([3000 * scale, 3200 * scale])
    more = '"4","1","void at::cuda::spin_kernel(long)","77"\n"5","1","_fwd","10"\n"6","1","_fwd","11"\n'
    both = ncu_calls_ms(table.replace("==PROF== Dis", more + "==PROF== Dis"), 2)  # subjects of two kernels and of one
    assert both == [found, pytest.approx([10 * scale, 11 * scale])]


def test_what_nsight_compute_says_instead_of_a_table_is_in_the_error() -> None:
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        ncu_calls_ms("==ERROR== ERR_NVGPUCTRPERM - no permission", 2)
    with pytest.raises(ValueError, match="known unit, got 'cycle'"):
        ncu_calls_ms(NCU.format(unit="cycle", a="1"), 2)
    with pytest.raises(ValueError, match="4 kernels in 3 calls"):
        ncu_calls_ms(NCU.format(unit="ns", a="1"), 3)
    command = ncu_command(["matmul 1024", "add 16 MiB"], 5)
    assert command[command.index("--clock-control") + 1] == "none" == command[command.index("--cache-control") + 1]
    assert command[-3:] == ["5", "matmul 1024", "add 16 MiB"]


def test_nsight_compute_that_cannot_be_started_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found, note = agreement.ncu_ms(["matmul 1024"])
    assert found == {} and note.startswith("ncu: ") and "ncu" in note


def test_a_call_that_cannot_be_compared_costs_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    device, said, kept = Device([0.1]), [], []

    def broken(_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(agreement, "SUBJECTS", {"a": lambda _: device.call, "b": broken, "c": lambda _: device.call})
    monkeypatch.setattr(agreement, "cupti_profile", device.profile)
    monkeypatch.setattr(compare, "__defaults__", (device.profile,))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = agreement.run_agreement(
        device, None, names="abc", keep=lambda found: kept.append(len(found)),  # type: ignore[arg-type]
        say=said.append)
    assert [one.name for one in found] == ["a", "c"] and kept == [1, 2]
    assert said[1] == "b: RuntimeError: CUDA out of memory"


def test_the_files_say_who_agrees(tmp_path: Path) -> None:
    found = [Agreement(subjects.SMALLEST, 0.0011, None, 0.0012, 0.0010, 0.0010, None, 1, 30),
             Agreement("fwd", 0.0516, 0.0515, 0.0506, 0.05, 0.05, 0.0509, 1, 30),
             Agreement("matmul", 0.0516, 0.0515, 0.0506, 0.05, 0.05, 0.0500, 1, 30),
             Agreement("bwd", 1.0, 1.0, 1.0, 0.970, 0.998, None, 2, 30, "ncu: none")]
    write_agreement(tmp_path / "a", found, 0.0029, {"gpu": "NVIDIA H100", "driver": None})
    with (tmp_path / "a" / "agreement.csv").open() as file:
        rows = {row["call"]: row for row in csv.DictReader(file)}
    assert float(rows["fwd"]["minus_cupti_us"]) == pytest.approx(1.6) and rows["fwd"]["agrees"] == "True"
    assert rows["matmul"]["agrees"] == "False" and rows["bwd"]["agrees"] == "True"
    assert float(rows["fwd"]["minus_cupti_pct"]) == pytest.approx(3.2) and rows["bwd"]["minus_ncu_us"] == ""
    assert {row["event_zero_ms"] for row in rows.values()} == {"0.0029"}
    text = (tmp_path / "a" / "agreement.md").read_text()
    assert "2 of 3 calls agree within 2% or 1 us" in text and "2.90 us that a pair of events" in text
    assert "1 with CUPTI's span, 1 of 2 with Nsight Compute." in text
    assert "**differs**" in text and "- bwd: ncu: none" in text and "+1.60 (+3.20%) | +0.60 (+1.20%)" in text
    assert markdown(found[3:], 0.0, {}).count("| bwd |") == 1


def test_there_are_subjects_of_ours_and_of_torch_over_three_decades() -> None:
    ours = [name for name in subjects.SUBJECTS if name.split()[0] in ("fwd", "bwd", "bwd_dq", "bwd_dkdv")]
    assert len(ours) >= 8 and len(subjects.SUBJECTS) - len(ours) >= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_commands_need_what_they_need() -> None:
    done = CliRunner().invoke(cli.app, ["agreement"])
    assert done.exit_code == 3 and "expected a CUDA device" in done.output
    done = CliRunner().invoke(cli.app, ["repeat"])
    assert done.exit_code == 2 and "either CONFIG.yaml or --resume" in done.output
    done = CliRunner().invoke(cli.app, ["repeat", "configs/repeat.yaml"])
    assert done.exit_code == 3 and "made for H100" in done.output
    done = CliRunner().invoke(cli.app, ["repeat", "--resume", "nowhere"])
    assert done.exit_code == 2 and "expected the folder of a repetition, got nowhere" in done.output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_cupti_sees_the_call_and_nothing_else() -> None:
    from sweeps.measure import DeviceTimer

    device = torch.device("cuda", 0)
    call = subjects.SUBJECTS["matmul 1024"](device)
    call()
    found = compare("matmul 1024", call, DeviceTimer(device))
    assert found.kernels >= 1 and 0.5 < found.ours_ms / found.cupti_ms < 2
