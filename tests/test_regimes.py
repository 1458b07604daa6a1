"""Kinds of shapes between which entries are not lent, and the dispatcher's use of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from flash_sink_attn import dispatch, selection
from flash_sink_attn.config import HopperBwdConfig, HopperBwdForm, HopperFwdConfig, TileConfig
from flash_sink_attn.estimate import Kind
from flash_sink_attn.heuristic import heuristic, prefers_hopper
from flash_sink_attn.regimes import (
    best_kind,
    compares,
    few_tiles,
    fits_ring,
    kinds,
    lends,
    loads_itself,
    slides,
)
from flash_sink_attn.tuned_table import Entry, ShapeKey, TunedTable
from flash_sink_attn.validity import limits_of
from tests.test_estimate import before


def tokens(key: ShapeKey, n: int, **other: Any) -> ShapeKey:
    return key._replace(seqlen_q=n, seqlen_k=n, **other)


LIMITS = limits_of(90)
CAUSAL = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, None, 1, 4096, 4096)
WINDOW = CAUSAL._replace(window=128)
WIDE = CAUSAL._replace(head_dim=128, head_dim_v=128)
ADD, SHARED = HopperBwdConfig(64, 128, 3), HopperBwdConfig(64, 128, 3, SPLIT_GROUP=2)
RECOMPUTE, SLIDE = HopperBwdConfig(64, 64, FORM=1), HopperBwdConfig(64, 192, 4, FORM=2)
PACKED = HopperFwdConfig(64, 64, 3, Q_STAGES=2, HEADS=2, PACK_HEADS=4, maxnreg=80)
ADD_WIDE, FOUR = HopperBwdConfig(64, 128), HopperBwdConfig(64, 128, SPLIT_GROUP=4)
TWO_AGAIN = HopperBwdConfig(64, 64, FORM=1, SPLIT_GROUP=2)
LONG = tokens(WIDE, 8192, heads_q=28, heads_kv=4, window=4096)
ALONE = HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3, LOADER=False)
PACKED_FIVE = HopperFwdConfig(64, 64, 5, Q_STAGES=2, HEADS=2, PACK_HEADS=4, maxnreg=128)
LARGE = HopperFwdConfig(192, 128, 3, PROGRAMS_PER_SM=1)


def entry(config: Any, measured: ShapeKey) -> Entry:
    kernel: Any = {TileConfig: "fwd", HopperFwdConfig: "hopper_fwd", HopperBwdConfig: "hopper_bwd"}[type(config)]
    return Entry(kernel, measured, config, 1.0, "fwd" if kernel.endswith("fwd") else "bwd", None, "case", "run")


@pytest.mark.parametrize(("config", "measured", "key", "lent"), [
    (TileConfig(64, 64), tokens(CAUSAL, 2048), CAUSAL, True),
    # 672 tiles of 64 rows: more programs at once before the first operand in registers
    (TileConfig(64, 64, REGISTER_A=True), tokens(CAUSAL, 1024), tokens(CAUSAL, 1300, heads_q=32), False),
    (TileConfig(64, 64), tokens(CAUSAL, 1250, heads_q=32), tokens(CAUSAL, 1300, heads_q=32), True),
    # 288 programs where 264 run at once
    (PACKED_FIVE, tokens(WINDOW, 8192, window=180), tokens(WINDOW, 2300, window=180), False),
    (PACKED_FIVE, tokens(WINDOW, 8192, window=180), tokens(WINDOW, 7700, window=180), True),
    (SHARED, tokens(CAUSAL, 1024), tokens(CAUSAL, 2048), True),
    (SHARED, tokens(CAUSAL, 2048), CAUSAL, False),
    # sections of eight shares, as of 2048; of seven, which is all that run at once, two took 343 us and three 281
    (SHARED, tokens(CAUSAL, 2048), tokens(CAUSAL, 2049), True),
    (ADD, CAUSAL, tokens(CAUSAL, 8192), True), (ADD, CAUSAL, tokens(CAUSAL, 2048), False),
    (ADD, tokens(CAUSAL, 1024), tokens(CAUSAL, 2048), False),               # measured before groups could be shared
    (ADD, CAUSAL._replace(heads_q=8), tokens(CAUSAL, 2048, heads_q=8), True),             # a group of one cannot be
    (SLIDE, WINDOW, WINDOW._replace(window=129), True), (SLIDE, WINDOW, WINDOW._replace(window=130), False),
    (SLIDE, WINDOW, WINDOW._replace(seqlen_q=64), False), (RECOMPUTE, WINDOW._replace(window=200), WINDOW, False),
    (RECOMPUTE, WINDOW._replace(window=200), WINDOW._replace(window=384), True),
    # FORM 0 takes 826.6 us, FORM 1 909.1
    (RECOMPUTE, WINDOW._replace(window=384), tokens(WINDOW, 8192, window=1024), False),
    (RECOMPUTE, WIDE._replace(window=512), WIDE._replace(window=1024), True),
    (RECOMPUTE, WIDE._replace(window=512), WIDE._replace(window=2048), False),
    # few programs of unequal length, measured before they could share a group; and more of them
    (ADD_WIDE, LONG._replace(seqlen_q=16384, seqlen_k=16384), LONG, False), (ADD_WIDE, LONG, LONG, False),
    # (three that add up are 2% faster by the estimate since they go in sections of twelve)
    (TWO_AGAIN, LONG, LONG._replace(window=2800), True), (TWO_AGAIN, LONG, LONG._replace(window=3000), False),
    (ADD_WIDE, LONG, tokens(LONG, 32768), True),
    # a window that hides nothing is none
    (dataclasses.replace(RECOMPUTE, SPLIT_GROUP=4), tokens(WIDE, 1100), tokens(WIDE, 1024, window=4096), True),
    (TWO_AGAIN, tokens(WIDE, 1100), tokens(WIDE, 1024, window=4096), False),
    # four do not divide a group of five
    (FOUR, tokens(WIDE, 2048, heads_q=28, heads_kv=4), tokens(WIDE, 2048, heads_q=20, heads_kv=4), False),
    (PACKED, WINDOW, WINDOW._replace(window=129), True), (PACKED, WINDOW, WINDOW._replace(window=130), False),
    (PACKED, WINDOW, tokens(WINDOW, 1024), False),                          # all programs at once
    # 5150 rows are 26.8 tiles of 192 and 20.1 of 256
    (LARGE, tokens(CAUSAL, 8192), tokens(CAUSAL, 5150), True), (LARGE, tokens(CAUSAL, 8192), CAUSAL, False),
    (HopperFwdConfig(256, 64, 4, PROGRAMS_PER_SM=1), tokens(CAUSAL, 8192), tokens(CAUSAL, 5150), False),
    # heads in fours where a group of eight was measured without
    (HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3, maxnreg=80), WINDOW._replace(window=500), WINDOW, False),
    (HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3, maxnreg=80), WINDOW, WINDOW._replace(window=100), True),
    (LARGE, tokens(WIDE, 8192), WIDE, True),
    # small tiles end at another window at head dim 128
    (HopperFwdConfig(64, 64), WIDE._replace(window=500), WIDE._replace(window=512), False),
    (HopperFwdConfig(64, 64), tokens(WIDE, 8192, window=512), tokens(WIDE, 8192, window=1024), False),
    # large ones that win under a short window, and shorter and longer ones
    (HopperFwdConfig(192, 64, 3), tokens(WIDE, 32768, window=256), tokens(WIDE, 32768, window=128), False),
    (HopperFwdConfig(192, 64, 3), tokens(WIDE, 32768, window=256), tokens(WIDE, 32768, window=300), True),
    (HopperFwdConfig(128, 64, 5, HEADS=4), tokens(WIDE, 8192, window=256), tokens(WIDE, 8192, window=200), True),
    (HopperFwdConfig(192, 64, 3, SHARE_Q=True), WIDE._replace(window=512), WIDE._replace(window=1024), True),
    (HopperFwdConfig(64, 64), WINDOW._replace(window=500), WINDOW._replace(window=700), True),
    (HopperFwdConfig(64, 64), WINDOW._replace(window=500), WINDOW._replace(window=710), False),
    # 4950 rows are 25.8 tiles of 192, 4096 are 21.3
    (HopperFwdConfig(128, 128, Q_STAGES=2, PROGRAMS_PER_SM=1), WIDE, tokens(WIDE, 4950), False),
    (HopperFwdConfig(192, 64, 4, SHARE_Q=True, PROGRAMS_PER_SM=1), tokens(WIDE, 8192), tokens(WIDE, 4950), True),
    (HopperFwdConfig(192, 64, 4, SHARE_Q=True, PROGRAMS_PER_SM=1), tokens(WIDE, 8192), WIDE, False),
    # seven heads do not fill a packed tile
    (TileConfig(64, 64, PACK_GQA=True, REGISTER_A=True), WINDOW, WINDOW._replace(heads_q=56), False),
    (TileConfig(64, 64, PACK_GQA=True), WINDOW, WINDOW._replace(heads_q=56), True),
])
def test_what_is_lent(config: Any, measured: ShapeKey, key: ShapeKey, lent: bool) -> None:
    assert lends(entry(config, measured), key) is lent


def test_the_portable_backward_is_always_lent() -> None:
    tiles = dataclasses.replace(entry(TileConfig(64, 64, REGISTER_A=True), tokens(CAUSAL, 1024)), kernel="bwd_dq")
    assert lends(tiles, tokens(CAUSAL, 1300, heads_q=32))


def test_the_ring_is_the_launchers() -> None:
    launch = pytest.importorskip("flash_sink_attn.hopper.launch_forward")
    for window in (None, 1, 64, 128, 129, 130, 257, 258, 1000):
        for stages in (2, 3, 5):
            config = HopperFwdConfig(64, 64, stages, HEADS=2)
            assert fits_ring(config, window) == launch._fits_ring(window, config)
            packs = window is not None and window - 1 <= 64 * (stages - 1)  # as forward() has it
            assert fits_ring(config, window) == packs


def test_the_kinds_follow_the_call() -> None:
    assert slides(WINDOW) and not slides(WINDOW._replace(heads_q=8)) and not slides(WIDE._replace(window=128))
    # 1152 programs of 64 rows that load for themselves; few tiles of 192 rows, of short and of long rows
    assert loads_itself(tokens(CAUSAL, 1111)) and not few_tiles(tokens(CAUSAL, 1111))
    few = tokens(CAUSAL, 1111, heads_q=16)
    assert not loads_itself(few) and few_tiles(few) and not few_tiles(tokens(few, 5050, heads_q=8))
    assert not loads_itself(tokens(CAUSAL, 3900, heads_q=24)) and loads_itself(tokens(WIDE, 1700, heads_q=36))
    # without groups nobody shares the keys that programs load for themselves; no entry of few rows speaks for them
    alone = tokens(WIDE, 1750, heads_q=20, heads_kv=20)
    assert not loads_itself(alone) and loads_itself(alone._replace(heads_kv=4))
    short = tokens(WIDE, 1024, heads_q=20, heads_kv=4)
    assert not lends(Entry("hopper_fwd", short, HopperFwdConfig(64, 64), 1.0, "fwd", None, "c", "r"), alone)
    assert not few_tiles(tokens(CAUSAL, 1500))
    assert not few_tiles(tokens(WIDE, 256)) and not few_tiles(tokens(WINDOW, 256))


ADDED, AGAIN, SLID = HopperBwdForm.ACCUMULATE, HopperBwdForm.RECOMPUTE, HopperBwdForm.SLIDE
QWEN = WIDE._replace(heads_q=28, heads_kv=4)


@pytest.mark.parametrize(("key", "wanted"), [
    (tokens(CAUSAL, 1024), (ADDED, 4)), (tokens(CAUSAL, 2048), (ADDED, 2)), (tokens(CAUSAL, 8192), (ADDED, 1)),
    (tokens(WIDE, 1024), (AGAIN, 4)), (tokens(WIDE, 512), (AGAIN, 4)), (tokens(WIDE, 4096), (ADDED, 1)),
    (tokens(QWEN, 1024), (AGAIN, 7)), (tokens(QWEN, 2048), (AGAIN, 4)), (tokens(QWEN, 8192), (ADDED, 1)),
    (tokens(WIDE, 2048, heads_q=20, heads_kv=4), (AGAIN, 5)), (tokens(CAUSAL, 5120, heads_q=32), (ADDED, 2)),
    (tokens(CAUSAL, 16384, heads_kv=64), (ADDED, 1)),
    (tokens(CAUSAL, 256, head_dim=192, head_dim_v=128), (ADDED, 1)),
    # windows
    (WINDOW, (SLID, 1)), (tokens(WINDOW, 1024), (AGAIN, 2)), (tokens(WINDOW, 1500), (SLID, 1)),
    (tokens(QWEN, 1024, window=256), (AGAIN, 4)), (tokens(QWEN, 4224, window=256), (AGAIN, 1)),
    (tokens(QWEN, 1024, window=256, varlen=True), (AGAIN, 1)),
])
def test_the_best_kind_is_what_was_measured_to_be(key: ShapeKey, wanted: tuple[HopperBwdForm, int]) -> None:
    assert best_kind(key) == wanted


@pytest.mark.parametrize(("key", "then", "now"), [
    (tokens(CAUSAL, 6100), (ADDED, 4), (ADDED, 3)), (tokens(QWEN, 6000), (ADDED, 7), (ADDED, 4)),
])
def test_sections_that_fill_the_card_need_fewer_shares(
    key: ShapeKey, then: tuple[HopperBwdForm, int], now: tuple[HopperBwdForm, int]
) -> None:
    """What was the best with sections of as many as run at once; by the estimate equal sections need fewer."""
    assert min(kinds(key), key=functools.partial(before, key)) == then
    assert best_kind(key) == now


def test_the_best_kind_exists_for_whatever_comes() -> None:
    for n in (0, 1, 63, 100000):
        for group in (1, 3, 7, 64):
            for window in (None, 1, 128, 1024, 4096):
                for d in (8, 64, 96, 128, 192, 256):
                    for deterministic in (False, True):
                        key = tokens(CAUSAL, n, heads_q=group, heads_kv=1, window=window, head_dim=d, head_dim_v=d)
                        assert best_kind(key, deterministic) in kinds(key)


@pytest.mark.parametrize(("heads", "d", "n", "window", "kind", "measured"), [
    ((64, 8), 64, 1024, None, (ADDED, 4), 81.1), ((64, 8), 64, 8192, None, (ADDED, 1), 2455.5),
    ((64, 8), 128, 1024, None, (AGAIN, 4), 131.4), ((28, 4), 128, 2048, None, (ADDED, 4), 203.5),
    ((20, 4), 128, 1500, None, (AGAIN, 5), 96.7), ((28, 4), 128, 1024, 256, (AGAIN, 4), 53.3),
    ((64, 8), 64, 4096, 128, (SLID, 1), 98.4), ((64, 8), 64, 1024, 128, (AGAIN, 2), 46.4),
])
def test_the_estimate_is_near_what_an_h200_measured(
    heads: tuple[int, int], d: int, n: int, window: int | None, kind: tuple[HopperBwdForm, int], measured: float
) -> None:
    key = ShapeKey.fixed("bfloat16", d, d, *heads, window, 1, n, n)
    assert before(key, Kind(*kind)) == pytest.approx(measured, rel=0.1)


def test_adding_in_order_is_lent_only_where_it_is_asked_for() -> None:
    ordered = HopperBwdConfig(64, 128, SPLIT_GROUP=2, DETERMINISTIC=True)
    key, near = tokens(CAUSAL, 8000), tokens(CAUSAL, 8192)
    own = table(("hopper_bwd", near, ordered, 0.3))
    assert dispatch.decide("hopper_bwd", key, LIMITS, own).source == "heuristic"
    assert dispatch.decide("hopper_bwd", key, LIMITS, own, deterministic=True).config == ordered


@pytest.mark.parametrize(("kernel", "key", "wanted"), [
    ("hopper_fwd", tokens(CAUSAL, 8192), HopperFwdConfig(256, 64, 4, PROGRAMS_PER_SM=1)),
    ("hopper_fwd", tokens(CAUSAL, 5150), LARGE), ("hopper_fwd", tokens(CAUSAL, 3450, heads_q=28, heads_kv=28), LARGE),
    ("hopper_fwd", CAUSAL, HopperFwdConfig(256, 64, 4, PROGRAMS_PER_SM=1)),
    ("hopper_fwd", WINDOW._replace(window=2048), HopperFwdConfig(256, 64, 4, Q_STAGES=2, PROGRAMS_PER_SM=1)),
    ("hopper_fwd", tokens(WIDE, 8192), HopperFwdConfig(192, 64, 4, SHARE_Q=True, PROGRAMS_PER_SM=1)),
    ("hopper_fwd", WIDE._replace(window=512),
     HopperFwdConfig(192, 64, 3, Q_STAGES=2, SPLIT_LOOPS=False, SHARE_Q=True, PROGRAMS_PER_SM=1)),
    ("fwd", WINDOW._replace(heads_q=56), TileConfig(64, 32, 4, 3, PACK_GQA=True, SPLIT_LOOPS=False, TMA=True, TAIL_N=16,
                                                    BRANCH_MASKS=True)),
    ("hopper_fwd", WINDOW, PACKED),
    ("hopper_fwd", tokens(WINDOW, 1024), HopperFwdConfig(64, 64, 3, Q_STAGES=2, HEADS=1, PACK_HEADS=4, maxnreg=80)),
    ("hopper_fwd", WINDOW._replace(window=256),
     HopperFwdConfig(64, 64, 5, Q_STAGES=2, HEADS=2, PACK_HEADS=4, maxnreg=128)),
    ("hopper_fwd", tokens(WINDOW, 2300, window=180), HopperFwdConfig(64, 64, 2, PROGRAMS_PER_SM=3, maxnreg=80)),
    ("fwd", tokens(CAUSAL, 1300, heads_q=32), TileConfig(64, 64, 4, 3, TMA=True)),
    ("fwd", tokens(CAUSAL, 1300), TileConfig(64, 64, 4, 3, TMA=True, REGISTER_A=True)),
    ("hopper_fwd", WINDOW._replace(window=512), HopperFwdConfig(64, 64, 2, PROGRAMS_PER_SM=3, maxnreg=80)),
    ("hopper_fwd", CAUSAL._replace(head_dim=192, head_dim_v=128),
     HopperFwdConfig(192, 64, 3, SHARE_Q=True, PROGRAMS_PER_SM=1)),
    ("hopper_fwd", CAUSAL._replace(head_dim=256, head_dim_v=256), HopperFwdConfig(128, 64, SHARE_Q=True)),
    ("hopper_fwd", CAUSAL._replace(head_dim=96, head_dim_v=96), HopperFwdConfig(128, 128, PROGRAMS_PER_SM=1)),
    ("hopper_fwd", WINDOW._replace(head_dim=192, head_dim_v=128),
     HopperFwdConfig(64, 64, SHARE_Q=True, PROGRAMS_PER_SM=2)),
    ("hopper_fwd", tokens(WIDE, 4224, window=256), ALONE), ("hopper_fwd", tokens(WIDE, 1024), ALONE),
    ("hopper_fwd", tokens(WIDE, 4096, heads_q=28, heads_kv=4, window=512), ALONE),  # 0.86 of 192 x 64
    ("hopper_fwd", tokens(WIDE, 8192, heads_q=28, heads_kv=4, window=512),
     HopperFwdConfig(192, 64, 3, Q_STAGES=2, SPLIT_LOOPS=False, SHARE_Q=True, PROGRAMS_PER_SM=1)),
    ("hopper_fwd", tokens(WIDE, 4224, window=256)._replace(varlen=True),
     HopperFwdConfig(64, 64, Q_STAGES=2, SHARE_Q=True, PROGRAMS_PER_SM=2)),
    ("hopper_fwd", tokens(WIDE, 384), HopperFwdConfig(64, 64, PROGRAMS_PER_SM=2)),
    ("hopper_fwd", tokens(WIDE, 2048), HopperFwdConfig(128, 128, Q_STAGES=2, SPLIT_LOOPS=False, PROGRAMS_PER_SM=1)),
    # With as many as run at once: 1888 us of four that add up, 2207 of one, 1933 of two that multiply again. In
    # sections of eight the four take 0.96 of it, and by the estimate two 1739 us for 1786; of the other shape one 1972
    # for two 2011 (2104 and 2078 with as many as run at once).
    ("hopper_bwd", LONG, dataclasses.replace(ADD_WIDE, SPLIT_GROUP=2)),
    ("hopper_bwd", LONG._replace(window=1024), RECOMPUTE),
    ("hopper_bwd", tokens(CAUSAL, 8192, window=4096), ADD), ("hopper_bwd", tokens(CAUSAL, 8192, window=1024), ADD),
    ("hopper_bwd", tokens(LONG, 32768), ADD_WIDE),
    ("hopper_bwd", tokens(LONG, 2048), dataclasses.replace(RECOMPUTE, SPLIT_GROUP=4)),
    ("hopper_bwd", WINDOW, SLIDE), ("hopper_bwd", tokens(CAUSAL, 2048), SHARED), ("hopper_bwd", CAUSAL, ADD),
])
def test_the_heuristic_follows_them(kernel: Any, key: ShapeKey, wanted: Any) -> None:
    assert heuristic(kernel, key, LIMITS) == wanted


def test_what_gives_the_same_bits_under_a_long_window() -> None:
    assert heuristic("hopper_bwd", LONG, LIMITS, deterministic=True) == TWO_AGAIN
    # 2602 us; adding in order took 2821 with as many as run at once, and all shares together take 0.80 of that
    assert heuristic("hopper_bwd", tokens(CAUSAL, 8192, window=4096), LIMITS, deterministic=True) == \
        dataclasses.replace(ADD, DETERMINISTIC=True)


def table(*entries: tuple[Any, ShapeKey, Any, float]) -> TunedTable:
    return TunedTable.build("h100", [Entry(kernel, key, config, ms, "fwd" if "fwd" in kernel else "bwd", None, "c", "r")
                                     for kernel, key, config, ms in entries], {"r": {}}, arch=90)


def test_an_entry_of_another_kind_is_passed_over_however_near() -> None:
    near, far = tokens(CAUSAL, 2176), tokens(CAUSAL, 1024)
    own = table(("hopper_bwd", near, ADD, 0.4), ("hopper_bwd", far, SHARED, 0.2))
    found = dispatch.decide("hopper_bwd", tokens(CAUSAL, 2048), LIMITS, own)
    assert (found.source, found.config) == ("nearest", SHARED)
    assert dispatch.decide("hopper_bwd", near, LIMITS, own).source == "exact"
    # what was measured for exactly this shape is used, whatever its kind
    assert dispatch.decide("hopper_bwd", far, LIMITS, table(("hopper_bwd", far, ADD, 0.4))).config == ADD


TILES = (("bwd_dq", TileConfig(64, 64)), ("bwd_dkdv", TileConfig(64, 64)))


def test_a_comparison_with_what_would_not_be_used_says_nothing() -> None:
    key, near, far = (tokens(CAUSAL, n) for n in (2048, 1920, 1600))
    unshared = [("hopper_bwd", near, ADD, 0.9), *((k, near, c, 0.5) for k, c in TILES)]
    found = selection.decide("bwd", key, LIMITS, table(*unshared))
    assert found.impl == "hopper" and "not for its kind" in found.reason and found.decisions[0].config == SHARED
    # the next shape is asked, and may say either
    for ms, impl in ((0.3, "hopper"), (0.7, "triton")):
        own = table(*unshared, ("hopper_bwd", far, SHARED, ms), *((k, far, c, 0.5) for k, c in TILES))
        assert selection.decide("bwd", key, LIMITS, own).impl == impl
    # measured for this very shape
    assert selection.decide("bwd", near, LIMITS, table(*unshared)).impl == "triton"


def test_an_implementation_measured_with_what_this_call_cannot_use_is_judged_by_the_heuristic() -> None:
    """Heads in eights were the fastest there; this call has a group of four."""
    near, key = WINDOW, tokens(WINDOW, 8192, heads_q=32)
    own = table(("hopper_fwd", near, PACKED, 0.1), ("fwd", near, TileConfig(64, 32), 0.2))
    found = selection.decide("fwd", key, LIMITS, own)
    assert found.impl == "hopper" and found.decisions[0].source == "heuristic" and "not for its kind" in found.reason
    # where nobody measured it, what was measured goes first
    assert selection.decide("fwd", key, LIMITS, table(("fwd", near, TileConfig(64, 32), 0.2))).impl == "triton"


@pytest.mark.parametrize("measured", [128, 640])
def test_a_comparison_is_not_lent_into_the_windows_of_the_portable_forward_or_out_of_them(measured: int) -> None:
    tile, wide = TileConfig(64, 64), HopperFwdConfig(64, 64, 2, PROGRAMS_PER_SM=3, maxnreg=80)
    outside, inside = tokens(WINDOW, 8192, window=measured), tokens(WINDOW, 8192, window=200)
    for near, key, ms, impl in ((outside, inside, 0.1, "triton"), (inside, outside, 0.9, "hopper")):
        own = table(("hopper_fwd", near, PACKED_FIVE, ms), ("fwd", near, tile, 0.5))
        found = selection.decide("fwd", key, LIMITS, own)
        assert found.impl == impl and "not for its kind" in found.reason
        portable = found.decisions if impl == "triton" else found.others
        assert (portable[0].source, portable[0].config) == ("nearest", tile)  # tiles are lent all the same
    # on the same side, and at the shape itself, what was measured decides
    own = table(("hopper_fwd", inside, wide, 0.1), ("fwd", inside, tile, 0.5))
    assert all(selection.decide("fwd", tokens(inside, n), LIMITS, own).impl == "hopper" for n in (8192, 8000))


def test_where_the_portable_forward_goes_first() -> None:
    def portable(**other: Any) -> bool:
        return not prefers_hopper("fwd", tokens(WINDOW, 8192, **{"window": 200, **other}), LIMITS)

    assert [w for w in (None, 1, 129, 130, 200, 256, 512, 513) if portable(window=w)] == [130, 200, 256, 512]
    # groups that are not multiples of four have no tiles of four heads
    assert [n for n in (24, 32, 40, 48, 56, 64, 96) if portable(heads_q=n, window=100)] == [40, 48, 56]
    assert [n for n in (8, 16, 24, 32, 40, 128) if portable(heads_q=n)] == [32, 40, 128]
    assert portable(varlen=True) and not portable(head_dim=128, head_dim_v=128)
    assert prefers_hopper("bwd", tokens(WINDOW, 8192, window=200), LIMITS)


def test_a_wide_backward_is_the_portable_one_under_a_short_window() -> None:
    for dims, portable in (((192, 128), True), ((256, 256), False)):
        short, long, none = (
            tokens(WINDOW, 4096, window=w, head_dim=dims[0], head_dim_v=dims[1]) for w in (128, 192, None))
        assert [prefers_hopper("bwd", key, LIMITS) for key in (short, long, none)] == [not portable, True, True]
        assert all(prefers_hopper("fwd", key, LIMITS) for key in (short, long, none))
        assert compares("bwd", long, none) and compares("bwd", short, long) != portable
        assert compares("fwd", short, long)


def test_a_choice_of_the_same_bits_does_not_hide_faster_ones() -> None:
    """A FORM 1 that is the nearest entry leaves the FORM 0 of the other shape in the comparison."""
    key, near, far = (tokens(WIDE, n) for n in (6000, 5500, 7000))
    own = table(("hopper_bwd", near, HopperBwdConfig(64, 128), 0.4), *((k, near, c, 0.5) for k, c in TILES))
    assert selection.decide("bwd", key, LIMITS, own).impl == "hopper"
    window = [k._replace(window=512) for k in (key, near, far)]
    own = table(("hopper_bwd", window[2], RECOMPUTE, 0.4), ("hopper_bwd", window[1], HopperBwdConfig(64, 128), 0.4),
                *((k, window[1], c, 0.5) for k, c in TILES))
    assert selection.decide("bwd", window[0], LIMITS, own).impl == "hopper"
    asked = selection.decide("bwd", window[0], LIMITS, own, deterministic=True)
    assert (asked.impl, asked.others[0].config) == ("triton", RECOMPUTE)


def test_a_selection_is_a_function_of_tables() -> None:
    own = table(("fwd", CAUSAL, TileConfig(64, 64), 0.1), ("hopper_fwd", CAUSAL, LARGE, 0.2))
    found = selection.decide("fwd", CAUSAL, LIMITS, own)
    assert (found.impl, found.others[0].config, found.problem) == ("triton", LARGE, None)
    lent = selection.decide("fwd", CAUSAL, LIMITS, None, [own])
    assert (lent.impl, lent.decisions[0].source) == ("triton", "other card")
    assert selection.decide("fwd", CAUSAL, LIMITS, None).impl == "hopper"
    # head dims that the Hopper kernels do not have, and a card that does not have the Hopper kernels
    odd = selection.decide("fwd", CAUSAL._replace(head_dim=40, head_dim_v=40), LIMITS, None)
    assert odd.impl == "triton" and odd.problem is not None
    assert selection.decide("fwd", CAUSAL, limits_of(80), None).impl == "triton"
