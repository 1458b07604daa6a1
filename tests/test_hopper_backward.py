"""The Hopper backward against float64 on a Hopper card, by the error rule, in a process that may hang and be killed.

FLASH_SINK_ATTN_RANDOM_SHAPES says how many random calls are made; default 20.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flash_sink_attn.hopper import support
from flash_sink_attn.reference import attention_reference_gradients
from tests.hopper_backward_cases import FAMILIES, KINDS, SINKS, Case, case, draw, problems
from tests.hopper_worker import Worker

PROBLEM = (support.device_problem(torch.device("cuda", 0)) if torch.cuda.is_available()
           else "no CUDA device of compute capability 9.0")
needs_hopper = pytest.mark.skipif(PROBLEM is not None, reason=f"the Hopper kernels cannot run: {PROBLEM}")
# A call takes milliseconds; building its kernels, and the first import, seconds.
LIMIT_S = 120.0
ANSWERS = (sys.executable, "-m", "tests.hopper_backward_cases")
RANDOM = int(os.environ.get("FLASH_SINK_ATTN_RANDOM_SHAPES", "20"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(ANSWERS)
    yield made
    made.close()


def judge(worker: Worker, of: Case) -> None:
    assert worker.ask(of.to_dict(), LIMIT_S) == [], of


@needs_hopper
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (63, 63), (129, 129), (517, 517), (200, 333), (1, 500),
                                                    (333, 120)])
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths(worker: Worker, family: str, seqlen_q: int, seqlen_k: int) -> None:
    """As many queries as keys, fewer, and more: the first rows then see no key."""
    dtype = "float16" if seqlen_k % 2 else "bfloat16"
    judge(worker, case(FAMILIES[family], seqlen_q=seqlen_q, seqlen_k=seqlen_k, dtype=dtype, dlse=seqlen_q % 2 == 0))


@needs_hopper
@pytest.mark.parametrize(("group", "heads_kv"), [(1, 3), (7, 2), (8, 1), (12, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups(worker: Worker, family: str, group: int, heads_kv: int) -> None:
    """Heads of their own keys, a group that no two warpgroups share evenly, and one key head for all."""
    of = case(FAMILIES[family], group=group, heads_kv=heads_kv, seqlen_q=301)
    if group == 1 and of.rejected():
        pytest.skip(str(of.rejected()))
    judge(worker, of)


@needs_hopper
@pytest.mark.parametrize("window", [1, 37, 128, 129, 130, 256, 1000])
@pytest.mark.parametrize("family", ["64", "128", "64-recompute", "128-recompute", "128-recompute-two", "64-slide",
                                    "64-slide-short", "192", "192-pair", "192-pair-ordered", "256"])
def test_windows(worker: Worker, family: str, window: int) -> None:
    """Up to the longest that slides and beyond it, where the call falls back to recomputing."""
    judge(worker, case(FAMILIES[family], window=window, seqlen_q=1100, group=3))


@needs_hopper
@pytest.mark.parametrize("seqlens_k", [(), (70, 2, 0, 63, 300, 64, 65, 3, 129)])
@pytest.mark.parametrize("family", FAMILIES)
def test_varlen(worker: Worker, family: str, seqlens_k: tuple[int, ...]) -> None:
    """Empty sequences, and lengths on both sides of a tile; NaN and infinities in one may not reach the next."""
    judge(worker, case(FAMILIES[family], seqlens=(64, 0, 1, 63, 300, 65, 64, 0, 129), seqlens_k=seqlens_k,
                       poison=True, dtype="float16" if seqlens_k else "bfloat16", dlse=bool(seqlens_k)))


@needs_hopper
@pytest.mark.parametrize("family", ["64", "128-recompute", "64-slide", "192", "192-pair"])
def test_many_sequences(worker: Worker, family: str) -> None:
    """More than one chunk of the search for a tile's sequence."""
    judge(worker, case(FAMILIES[family], seqlens=(1, 0, 2) + (1,) * 125 + (20, 0, 0, 3) * 40 + (200, 65), heads_kv=1))


@needs_hopper
@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("family", ["64", "128", "128-recompute", "64-slide", "192", "192-pair", "256"])
def test_sinks(worker: Worker, family: str, sinks: str) -> None:
    judge(worker, case(FAMILIES[family], seqlen_q=260, sinks=sinks, dtype="float16", dlse=True))


@needs_hopper
@pytest.mark.parametrize("wanted", ["q", "k", "v", "s", "kv", "qs", "qkv"])
@pytest.mark.parametrize("family", ["64", "128", "128-recompute", "64-slide", "192", "192-pair", "256"])
def test_only_some_gradients(worker: Worker, family: str, wanted: str) -> None:
    judge(worker, case(FAMILIES[family], seqlen_q=200, wanted=wanted))


@needs_hopper
@pytest.mark.parametrize("layout", ["packed", "heads_first"])
@pytest.mark.parametrize("family", ["64", "128", "128-recompute", "64-slide", "192", "192-pair", "256"])
def test_strides_are_read_in_place(worker: Worker, family: str, layout: str) -> None:
    judge(worker, case(FAMILIES[family], seqlen_q=203, layout=layout, batch=2, poison=True))


@needs_hopper
@pytest.mark.parametrize("family", FAMILIES)
def test_many_tiles(worker: Worker, family: str) -> None:
    """More than the card runs at once; in sections that are not full."""
    judge(worker, case(FAMILIES[family], batch=5, heads_kv=5, seqlen_q=1150))


@needs_hopper
@pytest.mark.parametrize("family", [name for name, (_, config, _) in FAMILIES.items() if config.reproducible])
def test_the_same_bits_on_request(worker: Worker, family: str) -> None:
    judge(worker, case(FAMILIES[family], batch=2, seqlen_q=700, deterministic=True))


@needs_hopper
@pytest.mark.parametrize("more", [{"batch": 4, "seqlen_q": 1150}, {"seqlens": (1150, 130, 2000, 1)}],
                         ids=["batch", "packed"])
@pytest.mark.parametrize("group", [1, 9])
@pytest.mark.parametrize("family", [name for name, (_, config, _) in FAMILIES.items() if config.DETERMINISTIC])
def test_walks_that_wait_for_their_neighbours(worker: Worker, family: str, group: int, more: dict[str, Any]) -> None:
    """One behind the other and abreast, up and down, in more sections than the card runs at once."""
    of = case(FAMILIES[family], heads_kv=5, group=group, deterministic=True, **more)
    if of.rejected():
        pytest.skip(str(of.rejected()))
    judge(worker, of)


@needs_hopper
@pytest.mark.parametrize("seed", range(RANDOM))
def test_random_shapes(worker: Worker, seed: int) -> None:
    """``python -m tests.hopper_backward_random --only SEED`` makes one again."""
    judge(worker, draw(seed, kinds=max(7, min(len(KINDS), RANDOM // 3))))


# Offsets that fall, that leave sequences out, and that point outside, of queries alone, too: in a process of its own.
WRONG_OFFSETS = """
import sys, torch
from flash_sink_attn import flash_sink_attn_varlen_func
from tests.hopper_backward_cases import FAMILIES, case

of = case(FAMILIES[sys.argv[1]], seqlens=(4000, 300, 200), group=4)
for values in ((0, 4000, 500, 4500), (0, 4500, 0, 4500), (-70, 10**9, 3, 64), (4000, 3000, 2000, 1000)):
    x = of.inputs("cuda")
    given = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.sinks)]
    offsets = torch.tensor(values, dtype=torch.int32, device="cuda")
    for keys in (None, torch.tensor((0, 4000, 4300, 4500), dtype=torch.int32, device="cuda")):
        o = flash_sink_attn_varlen_func(*given, offsets, of.window, cu_seqlens_k=keys, impl="hopper",
                                        deterministic=of.config.get("DETERMINISTIC") or None,
                                        config={"hopper_fwd": of.forward, "hopper_bwd": of.config})
        o.backward(x.do)
        torch.cuda.synchronize()
print("ended")
"""


@needs_hopper
@pytest.mark.parametrize("family", ["64", "64-ordered", "128-ordered-split", "128-recompute", "64-slide", "256"])
def test_wrong_cu_seqlens_end_and_stay_in_bounds(family: str) -> None:
    """What they point at is wrong, so results are; but nothing waits for a tile that no program has."""
    code = [sys.executable, "-c", WRONG_OFFSETS, family]
    ended = subprocess.run(code, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.stdout == "ended\n", ended.stderr[-2000:]


# What makes the calls, without a GPU


def test_every_case_is_valid() -> None:
    drawn = [draw(seed) for seed in range(400)]
    assert {c.rejected() for c in drawn} == {None}
    assert {c.config["FORM"] for c in drawn} == {0, 1, 2} and {c.head_dim for c in drawn} == {
        64, 96, 128, 192, 256}
    assert {c.sinks for c in drawn} >= set(SINKS) and {c.dlse for c in drawn} == {True, False}
    assert {bool(c.seqlens) for c in drawn} == {c.window is None for c in drawn} == {True, False}
    for of in FAMILIES.values():
        assert case(of, seqlen_q=9).rejected() is None, of


@pytest.mark.parametrize("of", [
    case(FAMILIES["64"], seqlen_q=20, seqlen_k=33, batch=2, poison=True, sinks="half", layout="packed", dlse=True),
    case(FAMILIES["64-slide"], seqlens=(5, 6, 9), window=4, poison=True),
    case(FAMILIES["128-recompute"], seqlen_q=9, seqlen_k=4, sinks="absent", window=3, wanted="qv"),
])
def test_the_judge_is_fair(of: Case) -> None:
    """Right gradients pass; one wrong row and a leak do not."""
    def right(case: Case, x: Any) -> dict[str, torch.Tensor]:
        sinks = None if x.sinks is None else x.sinks.float()
        dlse = case.gradient_of_lse(x)
        found: dict[str, list[torch.Tensor]] = {}
        at = 0
        for n in case.seqlens or (1,) * case.batch:  # each by itself, so that nothing leaks
            q, k, v, do = (t[at:at + n][None] if case.seqlens else t[at:at + n] for t in (x.q, x.k, x.v, x.do))
            part = attention_reference_gradients(
                q, k, v, sinks, do, window=case.window, dlse=None if dlse is None else dlse[at:at + n])
            for name in ("dq", "dk", "dv", "dsinks"):
                if name[1] in case.wanted and name in part:
                    t = part[name]
                    found.setdefault(name, []).append(t[0] if case.seqlens and name != "dsinks" else t)
            at += n
        return {name: sum(ts) if name == "dsinks" else torch.cat(ts).to(x.q.dtype)  # type: ignore[misc]
                for name, ts in found.items()}

    def spoiled(name: str) -> Any:
        def wrong(case: Case, x: Any) -> dict[str, torch.Tensor]:
            found = right(case, x)
            if name == "leak":
                found["dq"][0] += 0 * x.k.sum().to(found["dq"].dtype)
            else:
                found[name].view(-1)[-1] += 0.5
            return found
        return wrong

    assert problems(of, "cpu", right) == []
    for name in right(of, of.inputs("cpu")):
        assert any(message.startswith(f"{name}: ") for message in problems(of, "cpu", spoiled(name))), name
    assert any("reached another" in message for message in problems(of, "cpu", spoiled("leak"))) == of.poison
