"""Occupancy, steps, bounds and the table of a compile-only run."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sweeps import compile_table
from sweeps.bound import bound, steps_of, throughput_bound_ms
from sweeps.cases import Case
from sweeps.cost import compulsory_bytes, pairs
from sweeps.devices import find_card
from sweeps.occupancy import occupancy

H100 = find_card("H100")
GPT_OSS = Case("fwd", "bfloat16", 1, 8192, 8192, 64, 8, 64, 64, model="gpt-oss")
TILE: dict[str, Any] = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    "registers,shared,warps,expected",
    [
        (168, 74752, 4, (3, 12, "registers")),       # 5376 registers a warp, three warps in each quarter
        (128, 40960, 4, (4, 16, "registers")),
        (32, 0, 1, (32, 32, "blocks")),
        (32, 0, 16, (4, 64, "registers")),            # as many as warps allow; registers are named first
        (64, 115712, 4, (2, 8, "shared memory")),     # 113 KiB and the system's 1 KiB, twice
        (64, 115713, 4, (1, 4, "shared memory")),
        (255, 0, 16, (0, 0, "registers")),            # 8192 a warp: two in a quarter, eight in all
    ],
)
def test_occupancy_is_what_the_limits_leave(registers: int, shared: int, warps: int, expected: tuple[Any, ...]) -> None:
    assert dataclasses.astuple(occupancy(90, registers, shared, warps)) == expected


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="arch: expected one of 80, .*, got 70"):
        occupancy(70, 32, 0, 4)


@pytest.mark.parametrize("pass_", ["fwd", "bwd_dq", "bwd_dkdv"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("lengths", [(256, 256), (100, 190), (190, 100)])
def test_steps_visit_all_that_is_visible_and_little_else(pass_: str, window: int | None,
                                                         lengths: tuple[int, int]) -> None:
    """Against a count over the mask: every tile of a program that holds a visible pair is visited, and at most two
    more, since ranges begin where the mask does and not at a multiple of the tile."""
    case = dataclasses.replace(GPT_OSS, pass_=pass_, seqlen_q=lengths[0], seqlen_k=lengths[1], window=window, heads_q=4,
                               heads_kv=2)
    visible = [[0 <= i + lengths[1] - lengths[0] - j < (window or 10**9) for j in range(lengths[1])]
               for i in range(lengths[0])]
    own, other = (TILE["BLOCK_N"], TILE["BLOCK_M"]) if pass_ == "bwd_dkdv" else (TILE["BLOCK_M"], TILE["BLOCK_N"])
    rows = [list(column) for column in zip(*visible, strict=True)] if pass_ == "bwd_dkdv" else visible
    least = 0
    programs = -(-len(rows) // own)
    for p in range(programs):
        seen = {j for row in rows[p * own:(p + 1) * own] for j, v in enumerate(row) if v}
        least += -(-(max(seen) - min(seen) + 1) // other) if seen else 0
    steps = steps_of(case, TILE)
    times, each = (2, 2) if pass_ == "bwd_dkdv" else (4, 1)     # key heads, and a program's query heads
    assert steps.total() == programs * times
    total = sum(n * k for n, k in steps.items())
    assert least * times * each <= total <= (least + programs) * times * each


def test_packing_and_varlen_count_programs_as_the_launcher_does() -> None:
    packed = steps_of(dataclasses.replace(GPT_OSS, seqlen_q=100, seqlen_k=100), TILE | {"PACK_GQA": True})
    assert packed.total() == 13 * 8     # 800 rows of a group in tiles of 64
    varlen = dataclasses.replace(GPT_OSS, varlen="two", seqlens=(64, 128), batch=2, seqlen_q=128, seqlen_k=128)
    assert steps_of(varlen, TILE) == {2: 128, 4: 64}


def test_a_tail_is_a_part_of_a_step() -> None:
    """Eight tokens of eight heads see 135 keys under a window of 128: two tiles of 64, and 7 keys in one of 16."""
    case = dataclasses.replace(GPT_OSS, window=128)
    tile = TILE | {"BLOCK_M": 64, "BLOCK_N": 64, "PACK_GQA": True}
    assert max(steps_of(case, tile)) == 3 and max(steps_of(case, tile | {"TAIL_N": 16})) == 2.25
    assert steps_of(case, tile | {"TAIL_N": 16}).total() == steps_of(case, tile).total()
    # 23 keys are too many for it
    assert max(steps_of(dataclasses.replace(case, window=128 + 16), tile | {"TAIL_N": 16})) == 3
    varlen = dataclasses.replace(case, varlen="two", seqlens=(640, 1280), batch=2, seqlen_q=1280, seqlen_k=1280)
    assert max(steps_of(varlen, tile | {"TAIL_N": 16})) == 2.25
    assert steps_of(varlen, tile | {"TAIL_N": 16, "TMA": True}) == steps_of(varlen, tile | {"TAIL_N": 16})


def test_the_bound_names_what_binds() -> None:
    assert H100 is not None
    # Head dim 128, long and causal, few steps wasted: the tensor cores; a short window: memory or latency.
    long = dataclasses.replace(GPT_OSS, seqlen_q=16384, seqlen_k=16384, head_dim=128, head_dim_v=128)
    large = TILE | {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}
    found = bound(long, large, H100, registers=200, shared_bytes=99000)
    assert found is not None and found.binds == "tensor" and found.blocks == 1
    assert found.programs == 128 * 64 and found.waves == pytest.approx(128 * 64 / 132)
    flops = 4 * 128 * 64 * pairs(long) / (1 - found.wasted)
    assert found.parts["tensor"] == pytest.approx(flops / 754e9, rel=1e-3)
    assert throughput_bound_ms(long, TILE | {"BLOCK_M": 128, "BLOCK_N": 128}, H100) == pytest.approx(
        found.parts["tensor"])
    window = bound(dataclasses.replace(GPT_OSS, window=128), TILE, H100, registers=96, shared_bytes=24000)
    assert window is not None and window.binds == "memory"
    assert window.parts["memory"] == pytest.approx(compulsory_bytes(GPT_OSS) / 3.02e9)
    assert window.wasted > 0.1
    one = bound(dataclasses.replace(GPT_OSS, seqlen_q=256, seqlen_k=256, heads_q=8, heads_kv=1), TILE, H100,
                registers=96, shared_bytes=24000)
    assert one is not None and one.binds == "latency"
    assert bound(GPT_OSS, TILE | {"num_warps": 16}, H100, registers=255, shared_bytes=0) is None


def row(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return dict.fromkeys(compile_table.COLUMNS) | {
        "case": GPT_OSS.id, "case_fields": GPT_OSS.to_dict(), "impl": "triton", "pass": "fwd", "config": config,
        "status": "ok", "message": "", "registers": 96, "spills": 0, "shared_bytes": 24000, "instructions": 1000,
        "hgmma": 16, "tma": 8, "local": 0, "mufu": 40, "cache_hit": True, "compile_s": 1.25, "gpu": "H100"} | more


def test_the_table_orders_by_bound_and_keeps_what_did_not_build(tmp_path: Path) -> None:
    rows = [row(TILE), row(TILE | {"BLOCK_M": 16, "BLOCK_N": 16}, spills=40, local=9),
            row(TILE | {"BLOCK_M": 256}, status="compile_error", message="the compiler made wrong machine code: R8",
                registers=None, spills=None, shared_bytes=None)]
    assert compile_table.card_name(rows) == "H100"
    paths = compile_table.write(tmp_path, list(reversed(rows)), H100)
    with paths[0].open() as file:
        found = list(csv.DictReader(file))
    assert [r["status"] for r in found] == ["ok", "ok", "compile_error"]
    assert float(found[0]["bound_ms"]) < float(found[1]["bound_ms"]) and found[2]["bound_ms"] == ""
    assert found[0]["blocks_per_sm"] == "5" and found[0]["occupancy_limit"] == "registers"
    assert found[0]["hgmma"] == "16" and found[0]["tma"] == "8" and found[1]["local"] == "9"
    text = paths[1].read_text()
    assert "2 of 3 configurations built, 1 of them spill, 0 use no tensor core." in text
    assert "## Not built" in text and "wrong machine code: R8" in text
    assert "64x32 w4 s2" in text


def test_without_a_known_card_there_are_resources_and_no_bounds() -> None:
    records = compile_table.table([row(TILE)], None)
    assert records[0]["registers"] == 96 and records[0]["bound_ms"] is None
    assert "no occupancy and no bounds" in compile_table.as_markdown(records, None)


def test_a_miscompiled_kernel_is_a_compile_error_before_any_gpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_sink_attn import compile_only
    from sweeps.failures import classify
    from sweeps.ours import MiscompiledError, Triton

    sound = compile_only.Built(registers=90, spills=0, shared_bytes=100, hgmma=4, tma=2, local=0, mufu=3,
                               instructions=50, binary="b", cached=True, fault=None)
    built = [sound, dataclasses.replace(sound, registers=120, cached=False, binary="c")]
    monkeypatch.setattr(compile_only, "compile_kernel", lambda *a, **k: built.pop(0))
    found = Triton().compile(GPT_OSS.with_pass("bwd"), {}, 90)
    assert found == {"registers": 120, "spills": 0, "shared_bytes": 100, "hgmma": 8, "tma": 4, "local": 0, "mufu": 6,
                     "instructions": 100, "cache_hit": False, "binary": "b-c"}
    built.append(dataclasses.replace(sound, fault="the compiled loop at 0x10 overwrites R8"))
    with pytest.raises(MiscompiledError, match="wrong machine code: the compiled loop at 0x10 overwrites R8") as error:
        Triton().compile(GPT_OSS, TILE, 90)
    assert classify(error.value, building=True) == "compile_error"
