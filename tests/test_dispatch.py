"""The ladder explicit > tuned > heuristic, and that the heuristic is always something that can work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sink_attn import dispatch
from flash_sink_attn.config import KERNELS, AttnConfig, TileConfig, limits_of, reject_reason
from flash_sink_attn.dispatch import DeviceInfo, choose, device_info, heuristic
from flash_sink_attn.tuned_table import ENV_VAR, Entry, ShapeKey, TunedTable, TunedTableError

KEY = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, 128, 1, 8192, 8192)
TUNED, ASKED = TileConfig(128, 32, 8, 4, maxnreg=168), TileConfig(16, 256, 2, 1)
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an H100 whose user has a table with one forward entry."""
    path = tmp_path / "mine.json"
    entry = Entry("fwd", KEY, TUNED, 0.1, "fwd", None, "case", "run")
    TunedTable.build("h100", [entry], {"run": {}}).save(path)
    monkeypatch.setenv(ENV_VAR, str(path))
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("h100", 90))
    return path


def test_explicit_goes_before_tuned_before_heuristic(table: Path) -> None:
    assert choose("fwd", KEY, DEVICE, AttnConfig(fwd=ASKED)) == (ASKED, "explicit")
    assert choose("fwd", KEY, DEVICE) == (TUNED, "tuned")
    assert choose("fwd", KEY, DEVICE, AttnConfig(bwd_dq=ASKED)) == (TUNED, "tuned")
    expected = heuristic("bwd_dq", KEY, limits_of(90))
    assert choose("bwd_dq", KEY, DEVICE) == choose("bwd_dq", KEY, DEVICE, AttnConfig(fwd=ASKED)) == (
        expected, "heuristic")


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"head_dim": 72}, {"head_dim_v": 72}, {"heads_q": 32}, {"heads_kv": 4},
               {"window": 129}, {"window": None}, {"batch": 2}, {"seqlen_q": 8191}, {"seqlen_k": 8193},
               {"varlen": True}])
def test_an_entry_is_for_exactly_its_shape(table: Path, change: dict[str, Any]) -> None:
    assert choose("fwd", KEY._replace(**change), DEVICE).source == "heuristic"


def test_without_the_variable_the_users_table_is_not_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("a-card-nobody-has", 90))
    assert choose("fwd", KEY, DEVICE).config != TUNED  # the table is an H100's
    monkeypatch.delenv(ENV_VAR)
    assert choose("fwd", KEY, DEVICE).source == "heuristic"


def test_a_corrupt_table_is_an_error_and_not_silence(table: Path) -> None:
    broken = table.with_name("broken.json")
    broken.write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_VAR, str(broken))
        with pytest.raises(TunedTableError, match="broken.json: not valid JSON"):
            choose("fwd", KEY, DEVICE)


def test_a_cpu_has_no_table_and_hoppers_tiles() -> None:
    assert device_info(torch.device("cpu")) == DeviceInfo(None, 90)


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 128])
def test_the_heuristic_is_valid_for_every_head_dim(arch: int, dtype: str, window: int | None) -> None:
    limits, rejected = limits_of(arch), []
    for head_dim in range(8, 257, 8):
        for head_dim_v in {head_dim, 8, 64, 128, 256}:
            for heads_q in (8, 1):
                key = ShapeKey.fixed(dtype, head_dim, head_dim_v, heads_q, 1, window, 1, 4096, 4096)
                for kernel in KERNELS:
                    tile = heuristic(kernel, key, limits)
                    reason = reject_reason(tile, kernel, head_dim=head_dim, head_dim_v=head_dim_v, group=heads_q,
                                           limits=limits)
                    if reason:
                        rejected.append((kernel, head_dim, head_dim_v, heads_q, tile, reason))
    assert rejected == []
