"""Work and floors against brute force, against numbers worked out by hand, and against the card's own figures."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_sink_attn.devices import gpu_slug
from sweeps.cases import PASSES, Case
from sweeps.cost import compulsory_bytes, floor_ms, flops, pairs, tokens, visible_pairs
from sweeps.devices import CARDS, find_card


def brute(seqlen_q: int, seqlen_k: int, window: int | None) -> int:
    """Counts visible pairs by the mask's definition, one pair at a time."""
    width = seqlen_k if window is None else window
    return sum(0 <= i + seqlen_k - seqlen_q - j < width for i in range(seqlen_q) for j in range(seqlen_k))


def case(pass_: str = "fwd", *, seqlen: int = 4, window: int | None = None, **fields: object) -> Case:
    base = Case(pass_, "bfloat16", 1, seqlen, seqlen, 2, 1, 16, 16, window)
    return dataclasses.replace(base, **fields)  # type: ignore[arg-type]


@given(st.integers(0, 40), st.integers(0, 40), st.none() | st.integers(1, 50))
def test_pairs_equal_the_mask_counted_pair_by_pair(seqlen_q: int, seqlen_k: int, window: int | None) -> None:
    assert visible_pairs(seqlen_q, seqlen_k, window) == brute(seqlen_q, seqlen_k, window)


def test_pairs_of_whole_batches() -> None:
    assert pairs(case(seqlen=10, batch=3)) == 3 * 55
    packed = case(seqlen=7, batch=3, varlen="x", seqlens=(7, 0, 4), window=3)
    assert pairs(packed) == brute(7, 7, 3) + brute(4, 4, 3) == 18 + 9
    assert tokens(packed) == (11, 11)
    assert tokens(case(seqlen_q=5, seqlen_k=9, batch=2)) == (10, 18)


def test_pairs_of_a_length_no_loop_could_count() -> None:
    assert visible_pairs(2**20, 2**20, None) == 2**20 * (2**20 + 1) // 2
    assert visible_pairs(2**20, 2**20, 128) == 128 * 129 // 2 + (2**20 - 128) * 128


def test_flops_by_the_formulas() -> None:
    assert flops(case("fwd", seqlen=4, head_dim=16, head_dim_v=8)) == 2 * (16 + 8) * 2 * 10
    assert flops(case("bwd", seqlen=4, head_dim=16, head_dim_v=8)) == 2 * (3 * 16 + 2 * 8) * 2 * 10
    assert flops(case("bwd_dq", seqlen=4, head_dim=16, head_dim_v=8)) == 2 * (2 * 16 + 8) * 2 * 10
    assert flops(case("bwd_dkdv", seqlen=4, head_dim=16, head_dim_v=8)) == 2 * (2 * 16 + 2 * 8) * 2 * 10


def test_parts_are_credited_the_recomputation_they_cannot_avoid() -> None:
    """Scores and dP are credited to both parts, so together they exceed the backward by just those two products."""
    whole, dq, dkdv = (flops(case(p, head_dim=24, head_dim_v=16)) for p in ("bwd", "bwd_dq", "bwd_dkdv"))
    assert dq + dkdv - whole == 2 * (24 + 16) * 2 * 10
    assert flops(case("fwd_bwd")) == flops(case("fwd")) + flops(case("bwd"))


def test_bytes_by_hand() -> None:
    # 10 query tokens x 2 heads, 12 key tokens x 1 head, D 16, Dv 8, two bytes each; lse and sinks in float32
    shape = {"seqlen_q": 10, "seqlen_k": 12, "head_dim": 16, "head_dim_v": 8}
    q, k, v, o, lse, sinks = 10 * 2 * 32, 12 * 32, 12 * 16, 10 * 2 * 16, 10 * 2 * 4, 2 * 4
    assert compulsory_bytes(case("fwd", **shape)) == q + k + v + sinks + o + lse
    assert compulsory_bytes(case("bwd", **shape)) == 2 * (q + k + v + sinks) + 2 * o + lse
    assert compulsory_bytes(case("bwd_dq", **shape)) == 2 * q + k + v + 2 * sinks + 2 * o + 2 * lse
    assert compulsory_bytes(case("bwd_dkdv", **shape)) == q + 2 * (k + v) + o + 2 * lse
    assert compulsory_bytes(case("fwd", sinks=False, **shape)) == q + k + v + o + lse


@pytest.mark.parametrize("heads_q,heads_kv,head_dim,seqlen,window,forward,backward", [
    (64, 8, 128, 8192, None, 1.458, 3.646), (64, 8, 64, 8192, None, 0.729, 1.823),
    (64, 8, 64, 8192, 128, 0.051, 0.101), (28, 4, 128, 4224, 256, 0.023, 0.050)])
def test_floors_of_the_board_on_an_h100(heads_q: int, heads_kv: int, head_dim: int, seqlen: int, window: int | None,
                                        forward: float, backward: float) -> None:
    """Worked out independently from a copy rate of 3.02 TB/s and a GEMM rate of 754 TFLOP/s."""
    h100 = find_card("H100")
    assert h100 is not None
    workload = Case("fwd", "bfloat16", 1, seqlen, seqlen, heads_q, heads_kv, head_dim, head_dim, window)
    assert floor_ms(workload, h100) == pytest.approx(forward, abs=6e-4)
    assert floor_ms(workload.with_pass("bwd"), h100) == pytest.approx(backward, abs=6e-4)


def test_every_pass_has_a_cost() -> None:
    for pass_ in PASSES:
        assert flops(case(pass_)) > 0 and compulsory_bytes(case(pass_)) > 0


@pytest.mark.parametrize("name,slug", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H20", "h20"),
    ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA H100 NVL", "h100-nvl"), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-80gb-hbm3-mig-1g-10gb"),
    ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
    ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"), ("cpu", "cpu")])
def test_slugs_tell_cards_of_different_speed_apart(name: str, slug: str) -> None:
    assert gpu_slug(name) == slug


def test_a_name_without_letters_is_an_error() -> None:
    with pytest.raises(ValueError, match="name: expected the name of a GPU"):
        gpu_slug("  ")


def test_cards_are_found_by_their_driver_name_and_their_short_one() -> None:
    by_name = {name: find_card(name) for name in ("NVIDIA H100 80GB HBM3", "H100", "NVIDIA H200", "NVIDIA H20")}
    assert [card.name if card else None for card in by_name.values()] == ["H100", "H100", "H200", "H20"]
    h20 = by_name["NVIDIA H20"]
    assert h20 is not None and (h20.sms, h20.peak_tflops, h20.peak_tb_per_s) == (78, 148.0, 4.0)
    assert h20.ceiling_tflops == 148.0  # nothing measured: the data sheet's


def test_a_card_with_other_sms_is_not_the_card_of_the_table() -> None:
    assert find_card("NVIDIA H100 80GB HBM3", 132) is not None
    assert find_card("NVIDIA H100 80GB HBM3", 114) is None
    assert find_card("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert find_card("Voodoo 2") is None


def test_slugs_of_the_table_are_unique_and_belong_to_their_names() -> None:
    assert len({card.slug for card in CARDS}) == len({card.name for card in CARDS}) == len(CARDS)
    assert find_card("NVIDIA A100-SXM4-80GB") is not None and find_card("NVIDIA GeForce RTX 4090") is not None
