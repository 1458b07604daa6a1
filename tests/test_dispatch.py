"""The ladder explicit > exact > nearest > other card > heuristic, and that whatever it chooses can work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_sink_attn import dispatch, tuned_table
from flash_sink_attn.config import PORTABLE, AttnConfig, Kernel, TileConfig
from flash_sink_attn.dispatch import DeviceInfo, choose, decide, device_info, heuristic
from flash_sink_attn.kernel_code import kernel_code_hash
from flash_sink_attn.nearest import FARTHEST, distance
from flash_sink_attn.tuned_table import ENV_VAR, Entry, ShapeKey, TunedTable, TunedTableError
from flash_sink_attn.validity import limits_of, reject_reason

KEY = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, 128, 1, 8192, 8192)
TUNED, ASKED = TileConfig(128, 32, 8, 4, maxnreg=168), TileConfig(16, 256, 2, 1)
DEVICE = torch.device("cuda", 0)


FAR = {"head_dim": 72}, {"head_dim_v": 72}, {"window": None}, {"batch": 4}, {"seqlen_q": 1024}, {"varlen": True}
NEAR = {"dtype": "float16"}, {"heads_kv": 4}, {"window": 129}, {"batch": 2}, {"seqlen_q": 8191}, {"seqlen_k": 9000}


def entry(kernel: Kernel = "fwd", key: ShapeKey = KEY, config: TileConfig = TUNED, run: str = "run") -> Entry:
    return Entry(kernel, key, config, 0.1, kernel, None, "case", run)


def table_of(*entries: Entry, gpu: str = "h100", arch: int | None = 90, **run: str) -> TunedTable:
    return TunedTable.build(gpu, entries, {"run": run}, "the-table.json", arch)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an H100 whose user has a table with one forward entry."""
    path = tmp_path / "mine.json"
    table_of(entry()).save(path)
    monkeypatch.setenv(ENV_VAR, str(path))
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("h100", 90))
    monkeypatch.setattr(tuned_table, "_packaged_slugs", cache(lambda: ()))
    return path


def test_the_rungs_in_their_order(table: Path) -> None:
    assert choose("fwd", KEY, DEVICE, AttnConfig(fwd=ASKED)) == (ASKED, "explicit")
    assert choose("fwd", KEY, DEVICE) == (TUNED, "exact")
    assert choose("fwd", KEY, DEVICE, AttnConfig(bwd_dq=ASKED)) == (TUNED, "exact")
    assert choose("fwd", KEY._replace(batch=2), DEVICE) == (TUNED, "nearest")
    expected = heuristic("bwd_dq", KEY, limits_of(90))
    assert choose("bwd_dq", KEY, DEVICE) == choose("bwd_dq", KEY, DEVICE, AttnConfig(fwd=ASKED)) == (
        expected, "heuristic")


@pytest.mark.parametrize("change", FAR)
def test_an_entry_is_not_for_a_shape_of_another_family_or_far_away(table: Path, change: dict[str, Any]) -> None:
    assert choose("fwd", KEY._replace(**change), DEVICE).source == "heuristic"


@pytest.mark.parametrize("change", NEAR)
def test_an_entry_is_for_shapes_near_its_own(table: Path, change: dict[str, Any]) -> None:
    assert choose("fwd", KEY._replace(**change), DEVICE) == (TUNED, "nearest")


def test_the_nearest_entry_is_passed_over_where_the_rule_rejects_it() -> None:
    packed = TileConfig(64, 32, PACK_GQA=True)
    own = table_of(entry(config=packed), entry(key=KEY._replace(seqlen_q=6000), config=TUNED))
    assert decide("fwd", KEY._replace(dtype="float16"), limits_of(90), own).config == packed
    no_group = KEY._replace(heads_kv=64)
    decision = decide("fwd", no_group, limits_of(90), own)
    assert (decision.config, decision.source) == (TUNED, "nearest")
    assert decision.distance == pytest.approx(distance("fwd", no_group, KEY._replace(seqlen_q=6000)))
    tma = entry(key=KEY._replace(seqlen_q=8191), config=TileConfig(64, 32, TMA=True))
    assert decide("fwd", KEY._replace(head_dim=56, head_dim_v=56), limits_of(90), table_of(tma)).source == "heuristic"


def test_an_exact_entry_that_cannot_work_is_no_answer() -> None:
    impossible = entry(config=TileConfig(256, 256, num_warps=1))
    assert decide("fwd", KEY, limits_of(90), table_of(impossible)).source == "heuristic"


@given(st.sampled_from(PORTABLE), st.integers(1, 64), st.integers(1, 16), st.integers(1, 32), st.integers(1, 32),
       st.none() | st.integers(1, 9000), st.integers(1, 40000), st.booleans(), st.sampled_from([80, 89, 90, 100]))
def test_whatever_the_rung_the_configuration_is_valid(
    kernel: Kernel, batch: int, group: int, heads_kv: int, dims: int, window: int | None, seqlen: int, varlen: bool,
    arch: int,
) -> None:
    table = TunedTable.parse(default_table().read_text(), "h100.json")
    key = ShapeKey("bfloat16", 8 * dims, 8 * dims, group * heads_kv, heads_kv, window, batch, seqlen, seqlen, varlen)
    decision = decide(kernel, key, limits_of(arch), table)
    assert reject_reason(decision.config, kernel, head_dim=key.head_dim, head_dim_v=key.head_dim_v, group=group,
                         limits=limits_of(arch)) is None
    assert decision.distance is None or decision.distance <= FARTHEST


def default_table() -> Path:
    return Path(dispatch.__file__).parent / "tuned" / "h100.json"


def test_another_cards_entries_come_after_the_own_and_with_one_warning(
    table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table_of(entry(), gpu="h800").save(table)
    dispatch.forget()
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("a-card-nobody-has", 90))
    with caplog.at_level(logging.WARNING, logger="flash_sink_attn"):
        assert choose("fwd", KEY, DEVICE) == (TUNED, "other card")
        assert choose("fwd", KEY._replace(batch=2), DEVICE) == (TUNED, "other card")
    lent = [r.getMessage() for r in caplog.records if "tiles measured on" in r.getMessage()]
    assert len(lent) == 1 and "'h800'" in lent[0] and "'a-card-nobody-has'" in lent[0]
    own, other = table_of(entry(config=ASKED)), table_of(entry(), gpu="h800")
    assert decide("fwd", KEY._replace(batch=2), limits_of(90), own, [other]).config == ASKED
    assert decide("fwd", KEY, limits_of(90), None, [other])[2] == "other card"


def test_a_card_of_another_architecture_lends_nothing(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("a-card-nobody-has", 80))
    assert choose("fwd", KEY, DEVICE).source == "heuristic"


def test_entries_of_other_software_are_used_with_one_warning(
    table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = {"triton": metadata.version("triton"), "kernel_code": kernel_code_hash()}
    for facts, said in ((here, ""), ({}, ""), (here | {"triton": "2.0"}, "Triton 2.0"),
                        (here | {"kernel_code": "feed"}, "kernel code feed")):
        table_of(entry(), **facts).save(table)
        dispatch.forget()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="flash_sink_attn"):
            assert choose("fwd", KEY, DEVICE) == (TUNED, "exact")
            assert choose("fwd", KEY._replace(batch=2), DEVICE) == (TUNED, "nearest")
        assert len(caplog.records) == (1 if said else 0), facts
        assert said in caplog.text and (not said or "mine.json" in caplog.text)


def test_a_decision_says_why(table: Path) -> None:
    own, key = table_of(entry()), KEY._replace(batch=2)
    assert decide("fwd", KEY, limits_of(90), own).reason == "the entry for exactly this shape, of h100's table"
    assert "at distance 2.00 of at most 3" in decide("fwd", key, limits_of(90), own).reason
    assert "at distance 4.00, more than 3" in decide("fwd", KEY._replace(batch=4), limits_of(90), own).reason
    assert "no usable entry" in decide("bwd_dq", KEY, limits_of(90), own).reason
    assert "no tuned table" in decide("fwd", KEY, limits_of(90), None).reason
    lent = decide("fwd", KEY, limits_of(90), table_of(entry("bwd_dq")), [table_of(entry(), gpu="h800")])
    assert "h800's table; h100's table: no usable entry" in lent.reason


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
                for kernel in PORTABLE:
                    tile = heuristic(kernel, key, limits)
                    reason = reject_reason(tile, kernel, head_dim=head_dim, head_dim_v=head_dim_v, group=heads_q,
                                           limits=limits)
                    if reason:
                        rejected.append((kernel, head_dim, head_dim_v, heads_q, tile, reason))
    assert rejected == []
