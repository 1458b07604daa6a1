"""The Hopper forward against float64 on a Hopper card, by the error rule, in a process that may hang and be killed.

FLASH_SINK_ATTN_RANDOM_SHAPES says how many random calls are made; default 20.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flash_sink_attn.config import HopperFwdConfig
from flash_sink_attn.hopper import support
from tests.hopper_cases import (
    CAUSAL_64,
    FAMILIES,
    KINDS,
    LAYOUTS,
    MIMO,
    SINKS,
    VALUES,
    WINDOW_64,
    Case,
    build,
    case,
    draw,
    problems,
)
from tests.hopper_worker import Worker

PROBLEM = (support.device_problem(torch.device("cuda", 0)) if torch.cuda.is_available()
           else "no CUDA device of compute capability 9.0")
needs_hopper = pytest.mark.skipif(PROBLEM is not None, reason=f"the Hopper kernels cannot run: {PROBLEM}")
# A call takes milliseconds; building its kernel, and the first import, seconds.
LIMIT_S = 120.0
RANDOM = int(os.environ.get("FLASH_SINK_ATTN_RANDOM_SHAPES", "20"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def judge(worker: Worker, of: Case) -> None:
    assert worker.ask(of.to_dict(), LIMIT_S) == [], of


@needs_hopper
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (63, 63), (129, 129), (517, 517), (200, 333), (1, 500),
                                                    (333, 120)])
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths(worker: Worker, family: str, seqlen_q: int, seqlen_k: int) -> None:
    """As many queries as keys, fewer, and more: the first rows then see no key. The neighbour may be full of NaN."""
    of, window = FAMILIES[family]
    dtype = "float16" if seqlen_k % 2 else "bfloat16"
    judge(worker, case(of, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=window, dtype=dtype, poison=True))


@needs_hopper
@pytest.mark.parametrize(("group", "heads_kv"), [(1, 3), (7, 2), (12, 1)])
@pytest.mark.parametrize("family", ["64", "64-window", "128-window", "192-heads"])
def test_groups(worker: Worker, family: str, group: int, heads_kv: int) -> None:
    """Heads of their own keys, a group that no two warpgroups share evenly, and one key head for all."""
    (head_dim, head_dim_v, config), window = FAMILIES[family]
    config = HopperFwdConfig(**config.to_dict() | {"HEADS": min(config.HEADS, -(-group // config.warpgroups))})
    judge(worker, case((head_dim, head_dim_v, config), group=group, heads_kv=heads_kv, seqlen_q=301, window=window))


@needs_hopper
@pytest.mark.parametrize("window", [1, 37, 128, 256, 1000])
@pytest.mark.parametrize("family", ["64", "128-one-loop", "64-one-loop", "64-packed", "64-window", "64-window-tokens",
                                    "128-window", "256"])
def test_windows(worker: Worker, family: str, window: int) -> None:
    """Where the ring holds what 64 tokens see and where not; where the window's edge meets the diagonal."""
    judge(worker, case(FAMILIES[family][0], seqlen_q=700, seqlen_k=1100, window=window))


@needs_hopper
@pytest.mark.parametrize("seqlens_k", [(), (70, 2, 0, 63, 300, 64, 65, 3, 129)])
@pytest.mark.parametrize("family", ["64", "128-one-loop", "64-packed", "64-window", "64-window-tokens", "96", "128",
                                    "128-window", "128-three-two-tiles", "192", "256"])
def test_varlen(worker: Worker, family: str, seqlens_k: tuple[int, ...]) -> None:
    """Empty sequences, and lengths on both sides of a tile; NaN and infinities in one may not reach the next."""
    of, window = FAMILIES[family]
    judge(worker, case(of, seqlens=(64, 0, 1, 63, 300, 65, 64, 0, 129), seqlens_k=seqlens_k, window=window,
                       poison=True, dtype="float16" if seqlens_k else "bfloat16"))


@needs_hopper
def test_many_sequences(worker: Worker) -> None:
    """Hundreds of sequences, most of them of no token or one, so that the search for a tile's sequence goes on."""
    judge(worker, case(CAUSAL_64, seqlens=(1, 0, 2) + (1,) * 125 + (20, 0, 0, 3) * 40, heads_kv=1))


@needs_hopper
@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("family", ["64", "128-one-loop", "64-packed", "64-window", "128"])
def test_sinks(worker: Worker, family: str, sinks: str) -> None:
    of, window = FAMILIES[family]
    judge(worker, case(of, seqlen_q=260, seqlen_k=200, window=window, sinks=sinks, dtype="float16"))


@needs_hopper
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("values", VALUES[1:])
@pytest.mark.parametrize("family", ["64", "128-one-loop", "64-packed", "64-window", "128", "192", "256"])
def test_large_scores(worker: Worker, family: str, values: str, dtype: str) -> None:
    """The running maximum, which follows only what exceeds it by some slack, has to follow far and often."""
    of, window = FAMILIES[family]
    judge(worker, case(of, seqlen_q=900, window=window, values=values, dtype=dtype))


@needs_hopper
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("family", ["64", "64-packed", "64-window", "192"])
def test_strides_are_read_in_place(worker: Worker, family: str, layout: str) -> None:
    of, window = FAMILIES[family]
    judge(worker, case(of, seqlen_q=203, window=window, layout=layout, poison=True))


@needs_hopper
@pytest.mark.parametrize("family", ["64", "128-one-loop", "64-packed", "64-window", "128", "128-window", "192-heads"])
def test_more_tiles_than_programs(worker: Worker, family: str) -> None:
    """A program's rings go on from tile to tile."""
    of, window = FAMILIES[family]
    judge(worker, case(of, batch=5, heads_kv=4, seqlen_q=1150, window=window))


@needs_hopper
@pytest.mark.parametrize("family", ["64", "128-one-loop", "64-four-two-tiles", "64-three-two-tiles", "64-packed",
                                    "64-window", "64-window-two-heads", "128", "128-two-tiles", "128-three-two-tiles",
                                    "128-alone", "128-window", "128-window-tokens", "192-heads", "256"])
def test_more_tiles_of_a_packed_batch_than_programs(worker: Worker, family: str) -> None:
    """Tiles are drawn, and some slots are for none; the last draws of all programs find nothing."""
    of, window = FAMILIES[family]
    judge(worker, case(of, heads_kv=4, seqlens=(1150, 3, 0, 700, 64, 1, 129, 0) * 3, window=window))


@needs_hopper
@pytest.mark.parametrize("window", [100, 300])
@pytest.mark.parametrize("config", [HopperFwdConfig(192, 64, 2, PROGRAMS_PER_SM=1),
                                    HopperFwdConfig(192, 32, 4, PROGRAMS_PER_SM=1),
                                    HopperFwdConfig(256, 64, 3, PROGRAMS_PER_SM=1)], ids=["192x64", "192x32", "256x64"])
def test_rings_that_hold_no_more_than_what_a_warpgroup_passes_on(worker: Worker, config: HopperFwdConfig,
                                                                 window: int) -> None:
    """Blocks that only the other warpgroups of a packed batch's tile see fill all slots: were the next tile waited for
    before they are handed back, loader and warpgroups would wait for each other."""
    judge(worker, case((64, 64, config), heads_kv=4, seqlens=(1150, 3, 0, 700, 64, 1, 129, 0) * 3, window=window))


@needs_hopper
@pytest.mark.parametrize("section_heads", [1, 2])
@pytest.mark.parametrize("family", ["64", "64-window", "128-window"])
def test_sections_of_few_heads(worker: Worker, family: str, section_heads: int) -> None:
    """Heads in sections whose K and V stay in the cache, down to one head, and a last section that is not full."""
    of, window = FAMILIES[family]
    judge(worker, case(of, batch=3, heads_kv=3, seqlen_q=390, window=window, section_heads=section_heads))


@needs_hopper
@pytest.mark.parametrize("seed", range(RANDOM))
def test_random_shapes(worker: Worker, seed: int) -> None:
    """Random valid configurations and shapes: ``python -m tests.hopper_random --only SEED`` makes one again."""
    judge(worker, draw(seed, kinds=max(8, min(KINDS, RANDOM // 3))))


# What makes the calls, without a GPU


def test_a_packed_grid_has_a_counter_of_zeros_where_programs_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel draws where it has more tiles than programs; nobody else's counter is read."""
    def counters(of: Case) -> list[tuple[bool, bool]]:
        found: list[tuple[bool, bool]] = []

        def note(kernel: Any, programs: int, device: Any, runtime: list[Any], constants: Any, **how: Any) -> None:
            names = kernel.arg_names
            counter = runtime[names.index("Counter")]
            found.append((counter is not None, runtime[names.index("num_tiles")] > programs))

        zeroed.clear()
        build(of, note)
        assert zeroed == [more for there, more in found if there]
        return found

    zeroed: list[bool] = []

    def spy(*args: Any, zero: bool = False) -> Any:
        zeroed.append(zero)
        return own(*args, zero=zero)

    launch_forward = pytest.importorskip("flash_sink_attn.hopper.launch_forward")
    own = launch_forward.workspace
    monkeypatch.setattr(launch_forward, "workspace", spy)
    of, window = FAMILIES["64"]
    assert of[2].PROGRAMS_PER_SM == 1
    assert counters(case(of, seqlens=(1150, 3, 700) * 9, heads_kv=8)) == [(True, True)]
    assert counters(case(of, seqlens=(65, 3), heads_kv=1)) == [(True, False)]
    assert counters(case(of, seqlen_q=9000, heads_kv=8)) == [(False, True)]
    each = (of[0], of[1], dataclasses.replace(of[2], PROGRAMS_PER_SM=0))
    assert counters(case(each, seqlens=(1150, 3, 700) * 9, heads_kv=8)) == [(False, False)]


def test_every_case_is_valid_and_all_of_a_kind_use_one_kernel() -> None:
    drawn = [draw(seed) for seed in range(300)]
    assert {c.rejected() for c in drawn} == {None}
    assert {c.config["PACK_HEADS"] for c in drawn} >= {0, 4}
    assert len({(c.config["BLOCK_M"], c.config["BLOCK_N"], c.config["HEADS"], c.head_dim) for c in drawn}) > 12
    assert {c.head_dim for c in drawn} == {64, 96, 128, 192, 256} and {c.sinks for c in drawn} == set(SINKS)
    assert {c.values for c in drawn} == set(VALUES) and {c.layout for c in drawn} == set(LAYOUTS)
    assert {bool(c.seqlens) for c in drawn} == {c.window is None for c in drawn} == {True, False}
    for of, window in FAMILIES.values():
        assert case(of, seqlen_q=9, window=window).rejected() is None, of


@pytest.mark.parametrize("of", [
    case(CAUSAL_64, seqlen_q=20, seqlen_k=33, poison=True, sinks="half", layout="packed"),
    case(WINDOW_64, seqlens=(5, 0, 9), window=4, poison=True, values="waves"),
    case(MIMO, seqlen_q=9, seqlen_k=4, sinks="absent", layout="heads_first"),
])
def test_the_judge_is_fair(monkeypatch: pytest.MonkeyPatch, of: Case) -> None:
    """A right result passes; one wrong row, one wrong lse and a leak do not."""
    from flash_sink_attn.reference import attention_reference

    def right(case: Case, x: Any) -> dict[str, torch.Tensor]:
        sinks = None if x.sinks is None else x.sinks.float()
        o = torch.zeros(*x.q.shape[:-1], x.v.shape[-1], dtype=x.q.dtype)
        lengths = case.seqlens or (1,) * case.batch
        lses, at = [], 0
        for n in lengths:  # each by itself, so that nothing leaks
            q, k, v = (t[at:at + n][None] if case.seqlens else t[at:at + n] for t in (x.q, x.k, x.v))
            part, lse = attention_reference(q, k, v, sinks, window=case.window, dtype=torch.float32)
            o[at:at + n] = (part[0] if case.seqlens else part).to(o.dtype)
            lses.append(lse[0] if case.seqlens else lse)
            at += n
        return {"o": o, "lse": torch.cat(lses, dim=1 if case.seqlens else 0)}

    def wrong(name: str) -> list[str]:
        def spoiled(case: Case, x: Any) -> dict[str, torch.Tensor]:
            found = right(case, x)
            if name == "leak":
                found["o"][0] += 0 * x.k.sum().to(found["o"].dtype)
            else:
                found[name].view(-1)[-1] += 0.5
            return found

        monkeypatch.setattr("tests.hopper_cases.call", spoiled)
        return problems(of, "cpu")

    monkeypatch.setattr("tests.hopper_cases.call", right)
    assert problems(of, "cpu") == []
    assert any(message.startswith("o: ") for message in wrong("o"))
    assert any(message.startswith("lse: ") for message in wrong("lse"))
    assert any("reached another" in message for message in wrong("leak")) == of.poison


def test_a_hang_and_a_crash_are_failures() -> None:
    code = ("import json, os, sys, time\n"
            "print('up', flush=True)\n"
            "for line in sys.stdin:\n"
            "    what = json.loads(line)['seed']\n"
            "    what == 1 and time.sleep(60)\n"
            "    what == 2 and os._exit(7)\n"
            "    print(json.dumps([[f'{what} of {os.getpid()}'], what == 3, 0]), flush=True)\n")
    worker = Worker((sys.executable, "-c", code))
    answers = [worker.ask({"seed": seed}, 0.5 if seed == 1 else 30) for seed in (0, 1, 0, 2, 0, 3, 0)]
    first, hang, second, crash, third, last, fourth = answers
    worker.close()
    assert "hangs" in hang[0] and crash == ["the process ended with status 7"]
    assert len({first[0], second[0], third[0], fourth[0]}) == 4 and last[0].split()[2] == third[0].split()[2]
