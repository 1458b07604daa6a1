"""The validity rule, the split of a head dim, and a configuration's ways into text and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_sink_attn.config import (
    BLOCK_SIZES,
    KERNELS,
    MAX_HEAD_DIM,
    NUM_WARPS,
    PORTABLE,
    TAIL_SIZES,
    AttnConfig,
    HopperBwdConfig,
    HopperFwdConfig,
    TileConfig,
    reproducible,
)
from flash_sink_attn.validity import Limits, limits_of, reject_reason, split_head_dim

HOPPER = limits_of(90)
TILE = TileConfig(64, 64, 4, 2)

tile_configs = st.builds(
    TileConfig, BLOCK_M=st.sampled_from(BLOCK_SIZES), BLOCK_N=st.sampled_from(BLOCK_SIZES),
    num_warps=st.sampled_from(NUM_WARPS), num_stages=st.integers(1, 8), PACK_GQA=st.booleans(),
    SPLIT_LOOPS=st.booleans(), maxnreg=st.none() | st.integers(24, 255), TMA=st.booleans(),
    TAIL_N=st.sampled_from((0, *TAIL_SIZES)), BRANCH_MASKS=st.booleans())
hopper_fwd_configs = st.builds(
    HopperFwdConfig, BLOCK_M=st.sampled_from((64, 128, 192, 256)), BLOCK_N=st.sampled_from((32, 64, 128, 256)),
    num_stages=st.integers(1, 8), Q_STAGES=st.integers(1, 4), HEADS=st.integers(0, 4), SPLIT_LOOPS=st.booleans(),
    SHARE_Q=st.booleans(), PROGRAMS_PER_SM=st.integers(0, 4),
    maxnreg=st.none() | st.integers(24, 255))
hopper_bwd_configs = st.builds(
    HopperBwdConfig, BLOCK_M=st.sampled_from((64, 128)), BLOCK_N=st.sampled_from((64, 128, 192)),
    num_stages=st.integers(1, 8), FORM=st.integers(0, 2), BUFFERS=st.integers(0, 8), DETERMINISTIC=st.booleans())
attn_configs = st.builds(AttnConfig, *(st.none() | tile_configs for _ in PORTABLE), st.none() | hopper_fwd_configs,
                         st.none() | hopper_bwd_configs)


def reason(config: Any, kernel: Any = "fwd", head_dim: int = 64, head_dim_v: int | None = None, group: int = 8,
           limits: Limits = HOPPER) -> str | None:
    return reject_reason(config, kernel, head_dim=head_dim, head_dim_v=head_dim if head_dim_v is None else head_dim_v,
                         group=group, limits=limits)


@pytest.mark.parametrize("kernel", PORTABLE)
def test_an_ordinary_tile_is_accepted(kernel: Any) -> None:
    assert reason(TILE, kernel) is None
    assert reason(dataclasses.replace(TILE, TMA=True, SPLIT_LOOPS=False, maxnreg=128), kernel) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"BLOCK_M": 48}, "BLOCK_M must be one of (16, 32, 64, 128, 256), got 48"),
     ({"BLOCK_N": 8}, "BLOCK_N must be one of (16, 32, 64, 128, 256), got 8"),
     ({"num_warps": 3}, "num_warps must be one of (1, 2, 4, 8, 16), got 3"),
     ({"num_stages": 0}, "num_stages must be from 1 to 8, got 0"),
     ({"num_stages": 9}, "num_stages must be from 1 to 8, got 9"),
     ({"maxnreg": 23}, "maxnreg must be from 24 to 255, got 23"),
     ({"maxnreg": 256}, "maxnreg must be from 24 to 255, got 256")],
)
@pytest.mark.parametrize("kernel", PORTABLE)
def test_a_value_out_of_range(kernel: Any, changes: dict[str, int], words: str) -> None:
    assert reason(dataclasses.replace(TILE, **changes), kernel) == words


def test_packing_is_for_rows_of_queries_with_groups() -> None:
    packed = dataclasses.replace(TILE, PACK_GQA=True)
    for kernel in ("fwd", "bwd_dq"):
        assert reason(packed, kernel, group=8) is None
        assert "without a head group" in str(reason(packed, kernel, group=1))
    assert "fwd and bwd_dq only" in str(reason(packed, "bwd_dkdv", group=8))


def test_a_tail_is_the_forward_s_and_smaller_than_a_tile() -> None:
    tail = dataclasses.replace(TILE, BLOCK_N=32, TAIL_N=16)
    assert reason(tail) is None
    for kernel in ("bwd_dq", "bwd_dkdv"):
        assert "the kernel fwd only" in str(reason(tail, kernel))
    for size in (8, 32, 64, -16):
        assert f"below BLOCK_N=32, got {size}" in str(reason(dataclasses.replace(tail, TAIL_N=size)))
    assert reason(dataclasses.replace(tail, BLOCK_N=128, TAIL_N=64)) is None


@pytest.mark.parametrize("kernel", PORTABLE)
def test_masks_by_branches_are_for_one_loop(kernel: Any) -> None:
    assert "a choice of one loop" in str(reason(dataclasses.replace(TILE, BRANCH_MASKS=True), kernel))
    assert reason(dataclasses.replace(TILE, BRANCH_MASKS=True, SPLIT_LOOPS=False), kernel) is None


def test_the_copy_engine_needs_whole_rows_of_statistics() -> None:
    short = dataclasses.replace(TILE, BLOCK_M=16, TMA=True)
    assert "BLOCK_M of at least 32" in str(reason(short, "bwd_dkdv"))
    assert reason(short, "bwd_dq") is None
    assert reason(dataclasses.replace(short, TMA=False), "bwd_dkdv") is None


def test_the_copy_engine_needs_hopper_and_whole_head_dims() -> None:
    tma = dataclasses.replace(TILE, TMA=True)
    assert reason(tma, limits=limits_of(100)) is None
    assert all("compute capability 9.0" in str(reason(tma, limits=limits_of(arch))) for arch in (80, 86, 89))
    assert reason(tma, head_dim=128, head_dim_v=64) is None
    assert "got 96 and 96" in str(reason(tma, head_dim=96))
    assert "got 192 and 128" in str(reason(tma, head_dim=192, head_dim_v=128))


def test_accumulators_must_fit_into_the_registers() -> None:
    """A 128 x 128 tile of a forward with head dim 128 holds 2 x 128 x 128 floats: 256 registers of 128 threads."""
    tile = TileConfig(128, 128, 4, 2)
    assert "need 256 registers per thread, 255 are available with num_warps=4" in str(reason(tile, head_dim=128))
    assert reason(dataclasses.replace(tile, num_warps=8), head_dim=128) is None
    assert reason(dataclasses.replace(tile, num_warps=8, maxnreg=128), head_dim=128) is None
    assert "127 are available" in str(reason(dataclasses.replace(tile, num_warps=8, maxnreg=127), head_dim=128))
    # 16 warps share 65536 registers: 128 each
    assert "128 are available" in str(reason(TileConfig(256, 256, 16, 1), head_dim=128))


def test_tiles_in_flight_must_fit_into_shared_memory() -> None:
    """Six stages keep five K and V tiles of 2 x 128 x 128 halves in flight: 327680 bytes; four keep 196608."""
    tile = TileConfig(64, 128, 4, 6)
    assert "at least 327680 bytes of shared memory, the GPU has 232448" in str(reason(tile, head_dim=128))
    assert reason(dataclasses.replace(tile, num_stages=4), head_dim=128) is None
    assert "the GPU has 166912" in str(reason(dataclasses.replace(tile, num_stages=4), head_dim=128,
                                              limits=limits_of(80)))


def test_an_unknown_card_gets_the_smallest_known_limits() -> None:
    assert limits_of(75) == Limits(shared_bytes=101376, tma=False)
    assert limits_of(130) == Limits(shared_bytes=101376, tma=True)


@pytest.mark.parametrize(("config", "group", "whole"), [
    (TileConfig(64, 64, PACK_GQA=True), 8, True), (TileConfig(64, 64, PACK_GQA=True), 7, False),
    (TileConfig(16, 64, PACK_GQA=True), 32, False), (TileConfig(64, 64), 7, True)])
def test_packed_tiles_end_with_a_token_where_groups_divide_them(config: TileConfig, group: int, whole: bool) -> None:
    assert config.whole_tokens(group) is whole


def padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


@given(st.integers(1, MAX_HEAD_DIM))
def test_split_head_dim_covers_it_in_powers_of_two_and_wastes_no_more_than_padding(head_dim: int) -> None:
    first, second = split_head_dim(head_dim)
    assert first >= 16 and first & (first - 1) == 0
    assert second == 0 or (16 <= second <= first and second & (second - 1) == 0)
    assert head_dim <= first + second <= padded(head_dim)
    assert second == 0 or head_dim > first  # no part is empty


@pytest.mark.parametrize(
    ("head_dim", "parts"),
    [(8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)),
     (112, (128, 0)), (128, (128, 0)), (136, (128, 16)), (160, (128, 32)), (192, (128, 64)), (200, (256, 0)),
     (256, (256, 0))],
)
def test_split_head_dim_of_usual_ones(head_dim: int, parts: tuple[int, int]) -> None:
    assert split_head_dim(head_dim) == parts


@given(tile_configs | hopper_fwd_configs | hopper_bwd_configs)
def test_a_configuration_survives_text_and_dict(config: Any) -> None:
    assert type(config).decode(config.encode()) == config
    assert type(config).from_dict(config.to_dict()) == config
    assert set(config.to_dict()) == {f.name for f in dataclasses.fields(type(config))}


def test_the_rule_for_the_hopper_kernels() -> None:
    """Only what every version of them needs; the kernels' own tests know more."""
    good = {"hopper_fwd": HopperFwdConfig(128, 64), "hopper_bwd": HopperBwdConfig(64, 128)}
    for kernel, config in good.items():
        assert reason(config, kernel) is None
        assert "compute capability 9.0" in str(reason(config, kernel, limits=limits_of(100)))
        assert "got 40/40" in str(reason(config, kernel, head_dim=40))
        assert "expected a TileConfig" in str(reason(config, "fwd"))
        assert "expected a Hopper" in str(reason(TILE, kernel))
        assert "num_stages" in str(reason(dataclasses.replace(config, num_stages=0), kernel))
        assert "maxnreg" in str(reason(dataclasses.replace(config, maxnreg=300), kernel))


@pytest.mark.parametrize(("config", "shape", "said"), [
    (HopperFwdConfig(128, 64, HEADS=4), {"group": 8}, None),
    (HopperFwdConfig(128, 64, HEADS=4), {"group": 7}, None),  # the last of the seven has a warpgroup beside it idle
    (HopperFwdConfig(128, 64, HEADS=4), {"group": 6}, "HEADS must be from 0 to 3"),
    (HopperFwdConfig(64, 64, HEADS=2), {"group": 1}, "HEADS must be from 0 to 1"),
    (HopperFwdConfig(64, 64, HEADS=-1), {}, "HEADS must be"),
    (HopperFwdConfig(64, 256), {}, "BLOCK_N must be"), (HopperFwdConfig(320, 64), {}, "BLOCK_M must be"),
    (HopperFwdConfig(64, 64, Q_STAGES=5), {}, "Q_STAGES must be"),
    (HopperFwdConfig(64, 64, 1), {}, "num_stages must be at least 2"),
    (HopperFwdConfig(256, 64, 4, maxnreg=104), {"head_dim": 64}, "maxnreg must be at most 96 with 20 warps, got 104"),
    (HopperFwdConfig(64, 64, PROGRAMS_PER_SM=9), {}, "PROGRAMS_PER_SM must be"),
    (HopperFwdConfig(192, 128, 3), {}, None), (HopperFwdConfig(192, 128, 3), {"head_dim": 128}, "accumulators need"),
    (HopperFwdConfig(64, 64, maxnreg=64), {"head_dim": 64}, None),
    (HopperFwdConfig(64, 64, maxnreg=56), {}, "a matrix instruction needs 62 registers per thread, 56 are"),
    (HopperFwdConfig(64, 128, maxnreg=88), {}, "a matrix instruction needs 90"),
    (HopperFwdConfig(64, 32, maxnreg=88), {"head_dim": 128}, "a matrix instruction needs 94"),
    (HopperFwdConfig(64, 32), {"head_dim": 256}, "a matrix instruction needs 158 registers per thread, 128 are"),
    (HopperFwdConfig(128, 128, 2), {"head_dim": 128}, None),
    (HopperFwdConfig(128, 128, 3), {"head_dim": 128}, "bytes of shared memory"),
    (HopperFwdConfig(128, 64, 2, SHARE_Q=True), {"head_dim": 256}, None),
    (HopperFwdConfig(128, 64, 2), {"head_dim": 256}, "bytes of shared memory"),
    (HopperFwdConfig(64, 64, SHARE_Q=True), {"head_dim": 192, "head_dim_v": 128}, None),
    (HopperFwdConfig(64, 64, SHARE_Q=True), {"head_dim": 96}, "as wide as the output's, got 64 and 128"),
])
def test_the_rule_for_the_hopper_forward(config: HopperFwdConfig, shape: dict[str, int], said: str | None) -> None:
    found = reason(config, "hopper_fwd", **shape)
    assert found is None if said is None else said in str(found)


ACCUMULATE, RECOMPUTE, SLIDE = (
    HopperBwdConfig(64, 128), HopperBwdConfig(64, 64, FORM=1), HopperBwdConfig(64, 192, 4, FORM=2))
WIDE = HopperBwdConfig(64, 64)


@pytest.mark.parametrize(("config", "changes", "head_dim", "words"), [
    (ACCUMULATE, {}, 64, None), (ACCUMULATE, {}, 96, None), (ACCUMULATE, {}, 128, None),
    (RECOMPUTE, {}, 64, None), (RECOMPUTE, {}, 96, None), (RECOMPUTE, {"BLOCK_M": 128, "BLOCK_N": 128}, 128, None),
    (SLIDE, {}, 64, None), (ACCUMULATE, {"num_stages": 4, "BUFFERS": 4}, 64, None),
    (RECOMPUTE, {"maxnreg": 104}, 64, None), (RECOMPUTE, {"num_stages": 3}, 128, None),
    (ACCUMULATE, {"FORM": 3}, 64, "FORM must be one of"), (ACCUMULATE, {"BLOCK_M": 128}, 64, "BLOCK_M must be one of"),
    (ACCUMULATE, {"BLOCK_N": 64}, 64, "BLOCK_N must be one of"), (RECOMPUTE, {"BLOCK_N": 192}, 64, "with FORM 1"),
    (SLIDE, {"BLOCK_N": 128}, 64, "with FORM 2"), (SLIDE, {}, 128, "FORM 2 needs head dim 64"),
    (SLIDE, {}, 96, "FORM 2 needs head dim 64"),
    (ACCUMULATE, {"num_stages": 1}, 64, "num_stages must be at least 2"),
    (RECOMPUTE, {"num_stages": 1}, 128, "num_stages must be at least 2 with FORM 1"),
    (ACCUMULATE, {"BUFFERS": 3}, 128, "BUFFERS must be 0 or 4"), (RECOMPUTE, {"BUFFERS": 2}, 64, "BUFFERS must be 0"),
    (ACCUMULATE, {"BUFFERS": 9}, 64, "BUFFERS must be from"), (ACCUMULATE, {"maxnreg": 128}, 64, "must be None"),
    (RECOMPUTE, {"maxnreg": 100}, 64, "multiple of 8"), (RECOMPUTE, {"maxnreg": 120}, 128, "multiple of 8 from 128"),
    (ACCUMULATE, {"num_stages": 4}, 128, "of shared memory"), (SLIDE, {"BUFFERS": 3}, 64, "of shared memory"),
    (RECOMPUTE, {"num_stages": 7}, 128, "of shared memory"),
    (ACCUMULATE, {"DETERMINISTIC": True}, 64, None), (ACCUMULATE, {"SPLIT_GROUP": 2}, 128, None),
    (ACCUMULATE, {"SPLIT_GROUP": 0}, 64, "SPLIT_GROUP must leave"),
    (RECOMPUTE, {"SPLIT_GROUP": 9}, 64, "SPLIT_GROUP must leave"),
    (SLIDE, {"SPLIT_GROUP": 2}, 64, "SPLIT_GROUP must be 1"),
    (RECOMPUTE, {"DETERMINISTIC": True}, 64, "DETERMINISTIC must be False"),
])
def test_the_rule_for_the_hopper_backward(
    config: HopperBwdConfig, changes: dict[str, Any], head_dim: int, words: str | None
) -> None:
    found = reason(dataclasses.replace(config, **changes), "hopper_bwd", head_dim)
    assert found is None if words is None else words in str(found)


@pytest.mark.parametrize(("config", "head_dim", "head_dim_v", "words"), [
    (WIDE, 192, 128, None), (WIDE, 256, 256, None), (dataclasses.replace(WIDE, num_stages=3), 192, 128, None),
    (WIDE, 192, 192, "got 192/192"), (WIDE, 256, 128, "got 256/128"), (WIDE, 128, 128, "BLOCK_N must be one of"),
    (dataclasses.replace(WIDE, num_stages=3), 256, 256, "bytes of shared memory"),
    (dataclasses.replace(WIDE, num_stages=1), 192, 128, "num_stages must be at least 2"),
    (ACCUMULATE, 256, 256, "BLOCK_N must be 64 at head dims above 128"), (RECOMPUTE, 256, 256, "have FORM 0 only"),
    (ACCUMULATE, 192, 128, None), (dataclasses.replace(ACCUMULATE, num_stages=3), 192, 128, "bytes of shared memory"),
    (dataclasses.replace(ACCUMULATE, DETERMINISTIC=True), 192, 128, None),
    (dataclasses.replace(ACCUMULATE, SPLIT_GROUP=2), 192, 128, "SPLIT_GROUP must be 1"),
    (dataclasses.replace(WIDE, BLOCK_M=128), 192, 128, "BLOCK_M must be 64 at head dims above 128"),
    (SLIDE, 192, 128, "have FORM 0 only"), (dataclasses.replace(WIDE, BUFFERS=2), 256, 256, "BUFFERS must be 0"),
    (dataclasses.replace(WIDE, maxnreg=128), 256, 256, "maxnreg must be None"),
    (dataclasses.replace(WIDE, DETERMINISTIC=True), 256, 256, None),
    (dataclasses.replace(WIDE, DETERMINISTIC=True), 192, 128, None),
])
def test_the_rule_for_the_hopper_backward_at_wide_head_dims(
    config: HopperBwdConfig, head_dim: int, head_dim_v: int, words: str | None
) -> None:
    found = reason(config, "hopper_bwd", head_dim, head_dim_v)
    assert found is None if words is None else words in str(found)


def test_two_heads_at_once_need_two_heads() -> None:
    for two in (dataclasses.replace(RECOMPUTE, BLOCK_M=128), SLIDE):
        assert reason(two, "hopper_bwd", group=2) is None and "a group" in str(reason(two, "hopper_bwd", group=1))


def test_warps_of_the_hopper_kernels_are_their_warpgroups() -> None:
    """Four per 64 rows that accumulate, and the producer's four."""
    assert [HopperFwdConfig(m, 64).num_warps for m in (64, 128, 192, 256)] == [8, 12, 16, 20]
    assert HopperBwdConfig(64, 128).num_warps == HopperBwdConfig(64, 64).num_warps == 12
    assert HopperBwdConfig(64, 64, FORM=1).num_warps == 8


def test_which_backward_gives_the_same_bits() -> None:
    assert reproducible(TILE) and reproducible(HopperFwdConfig(64, 64)) and not reproducible(HopperBwdConfig(64, 64))
    assert reproducible(HopperBwdConfig(64, 64, FORM=1)) and reproducible(
        HopperBwdConfig(64, 64, DETERMINISTIC=True))


@given(attn_configs)
def test_a_call_s_tiles_survive_text_and_dict(config: AttnConfig) -> None:
    assert AttnConfig.decode(config.encode()) == config
    assert AttnConfig.from_dict(config.to_dict()) == config
    assert list(config.to_dict()) == [k for k in KERNELS if getattr(config, k) is not None]


def test_fields_left_out_take_their_defaults() -> None:
    assert TileConfig.from_dict({"BLOCK_M": 64, "BLOCK_N": 32}) == TileConfig(64, 32)
    assert AttnConfig.from_dict({}) == AttnConfig()


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 1}, "config: unknown field 'BLOCK_K'"),
     ({"BLOCK_M": 64}, "config: BLOCK_N is missing"), ({}, "config: BLOCK_M is missing")],
)
def test_a_bad_dict_is_named(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TileConfig.from_dict(fields)
    with pytest.raises(ValueError, match=words):
        AttnConfig.from_dict({"fwd": fields})


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="config: unknown kernel 'bwd', expected a subset of"):
        AttnConfig.from_dict({"bwd": TILE.to_dict()})


def test_one_tile_everywhere_is_packed_where_that_is_a_choice() -> None:
    tile = TileConfig(64, 32, 8, 3, PACK_GQA=True, SPLIT_LOOPS=False, maxnreg=96, TMA=True, REGISTER_A=True, TAIL_N=16,
                      BRANCH_MASKS=True)
    assert AttnConfig.everywhere(tile) == AttnConfig(
        fwd=tile, bwd_dq=dataclasses.replace(tile, TAIL_N=0),
        bwd_dkdv=dataclasses.replace(tile, PACK_GQA=False, TAIL_N=0))
