"""The kernels against float64 at awkward sizes, by the error rule. In the interpreter without a GPU, else on CUDA."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from flash_sink_attn import dispatch
from flash_sink_attn.config import PORTABLE, AttnConfig, TileConfig
from flash_sink_attn.dispatch import device_info
from flash_sink_attn.hopper import support
from flash_sink_attn.kernels.backward_dkdv import divide
from flash_sink_attn.testing import AttentionInputs, check, make_inputs, truth_and_eager
from flash_sink_attn.validity import limits_of, reject_reason
from tests.kernel_calls import DEVICE, assert_right, run_kernels, tiles

import triton  # isort: skip  (the package sets how kernels run, before any triton.jit)
import triton.language as tl  # isort: skip

needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
HAS_TMA = limits_of(device_info(torch.device(DEVICE)).arch).tma
HALF = (torch.float16, torch.bfloat16)


def awkward(count: int, seed: int, longest: int, most_heads: int) -> list[Any]:
    """Shapes that no tile divides, every feature in many combinations; the same list in every run.

    With more than ``most_heads`` query heads in all of the batch it has one member: the interpreter runs tile by tile.
    """
    draw = random.Random(seed)
    cases = []
    for i in range(count):
        group = draw.choice([1, 1, 2, 3, 7, 8])
        heads_kv = draw.choice([1, 2, 3]) if group < 7 else 1
        length = draw.choice([1, 2, 15, 16, 17, draw.randint(18, longest), draw.randint(18, longest)])
        batch = draw.choice([1, 2, 3])
        shape = {
            "batch": batch if batch * group * heads_kv <= most_heads else 1, "seqlen_q": length,
            "seqlen_k": draw.choice([length, length, length + draw.randint(1, longest), max(1, length // 2)]),
            "heads_q": group * heads_kv, "heads_kv": heads_kv, "head_dim": draw.choice([8, 16, 24, 32, 40, 64, 80, 96]),
            "dtype": draw.choice(HALF), "sinks": draw.random() < 0.8, "sink_scale": draw.choice([1.0, 1.0, 6.0]),
        }
        shape["head_dim_v"] = draw.choice([shape["head_dim"], shape["head_dim"], draw.choice([8, 48, 64])])
        window = draw.choice([None, 1, 2, 16, draw.randint(3, longest), 10 * longest])
        powers = {shape["head_dim"], shape["head_dim_v"]} <= {16, 32, 64}
        block_m, block_n = draw.choice([16, 32, 64]), draw.choice([16, 32, 64])
        split = draw.random() < 0.4
        config = tiles(block_m, block_n, SPLIT_LOOPS=split, PACK_GQA=group > 1 and draw.random() < 0.5,
                       TMA=HAS_TMA and powers and block_m > 16 and draw.random() < 0.7,
                       REGISTER_A=draw.random() < 0.5, BRANCH_MASKS=not split and draw.random() < 0.7,
                       TAIL_N=draw.choice([0, *(n for n in (16, 32) if n < block_n)]))
        name = "-".join(str(shape[k]) for k in ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "head_dim"))
        cases.append(pytest.param(shape, window, config, id=f"{i}-{name}-w{window}"))
    return cases


@pytest.mark.parametrize(("shape", "window", "config"), awkward(28, seed=1, longest=75, most_heads=12))
def test_awkward_shapes(shape: dict[str, Any], window: int | None, config: Any) -> None:
    assert_right(make_inputs(**shape, device=DEVICE), window=window, config=config)


@needs_cuda
@pytest.mark.parametrize(("shape", "window", "config"), awkward(120, seed=2, longest=700, most_heads=27))
def test_awkward_shapes_on_cuda(shape: dict[str, Any], window: int | None, config: Any) -> None:
    assert_right(make_inputs(**shape, device=DEVICE), window=window, config=config)


@pytest.mark.parametrize(("block_m", "block_n"), list(itertools.product([16, 32, 64, 128, 256], repeat=2)))
def test_every_block_combination(block_m: int, block_n: int) -> None:
    config = tiles(block_m, block_n, num_warps=8, num_stages=1)
    for kernel in ("fwd", "bwd_dq", "bwd_dkdv"):
        reason = reject_reason(getattr(config, kernel), kernel, head_dim=16, head_dim_v=16, group=2,
                               limits=limits_of(device_info(torch.device(DEVICE)).arch))
        assert reason is None or {block_m, block_n} == {256}, reason
        if reason:
            pytest.skip(reason)
    length = min(150, 2 * max(block_m, block_n) + 11)  # more than two of the tiles, few enough for the interpreter
    heads = 2 if DEVICE == "cuda" else 1  # how heads share keys has nothing to do with the blocks
    x = make_inputs(batch=1, seqlen_q=length, heads_q=heads, heads_kv=1, head_dim=16, dtype=torch.bfloat16,
                    device=DEVICE)
    assert_right(x, window=length // 2 - 5, config=config)
    assert_right(x, config=config)


@pytest.mark.parametrize("head_dim", [8, 24, 48, 72, 104, 128, 136, 192, 200, 256])
def test_head_dims(head_dim: int) -> None:
    x = make_inputs(seqlen_q=37, heads_q=2, heads_kv=1, head_dim=head_dim, dtype=torch.float16, device=DEVICE)
    assert_right(x, window=20)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(192, 128), (64, 256), (96, 160)])
def test_value_head_dim_of_its_own(head_dim: int, head_dim_v: int) -> None:
    x = make_inputs(seqlen_q=41, heads_q=2, heads_kv=2, head_dim=head_dim, head_dim_v=head_dim_v, dtype=torch.bfloat16,
                    device=DEVICE)
    assert_right(x)


def test_gradient_through_lse() -> None:
    x = make_inputs(batch=2, seqlen_q=33, seqlen_k=50, heads_q=4, heads_kv=2, head_dim=32, dtype=torch.bfloat16,
                    device=DEVICE)
    dlse = torch.randn(2, 4, 33, device=DEVICE)
    assert_right(x, window=9, dlse=dlse)


@pytest.mark.parametrize("window", [None, 5])
def test_rows_without_keys(window: int | None) -> None:
    x = make_inputs(seqlen_q=60, seqlen_k=13, heads_q=2, heads_kv=1, head_dim=16, dtype=torch.float16, device=DEVICE)
    outputs = assert_right(x, window=window)
    assert (outputs["o"][:, :47] == 0).all() and (outputs["dq"][:, :47] == 0).all()
    assert x.sinks is not None
    torch.testing.assert_close(outputs["lse"][0, :, :47], x.sinks[:, None].expand(2, 47))


@pytest.mark.parametrize("sinks", [[0.0, float("-inf")], [60.0, -60.0], None], ids=["absent", "extreme", "none"])
def test_sink_values(sinks: list[float] | None) -> None:
    x = make_inputs(seqlen_q=40, seqlen_k=30, heads_q=2, heads_kv=2, head_dim=16, dtype=torch.bfloat16, device=DEVICE,
                    sinks=sinks is not None)
    if sinks is not None:
        assert x.sinks is not None
        x.sinks.copy_(torch.tensor(sinks))
    outputs = assert_right(x, window=12)
    if sinks is not None and sinks[1] == float("-inf"):
        assert (outputs["lse"][0, 1, :10] == float("-inf")).all()
        assert outputs["dsinks"][1] == 0


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_softmax_scale(scale: float) -> None:
    x = make_inputs(seqlen_q=40, heads_q=2, heads_kv=1, head_dim=32, dtype=torch.float16, device=DEVICE)
    assert_right(x, scale=scale)


# Of the keys that the rows of a tile see, from none to all are left for the tail; and each mask is needed by the first
# tile, by the last, by both, by all or by none.
@pytest.mark.parametrize(("tail", "branch"), [(16, False), (16, True), (0, True)])
@pytest.mark.parametrize(("length_q", "length_k", "window"), [
    (70, 70, 33), (70, 70, 1), (37, 70, 40), (70, 37, 20), (64, 64, None), (33, 80, 16), (70, 70, 69)])
def test_tails_and_masks_where_needed(
    length_q: int, length_k: int, window: int | None, tail: int, branch: bool
) -> None:
    pack = length_q != 64
    config = tiles(16, 32, PACK_GQA=pack, SPLIT_LOOPS=not branch and pack, TAIL_N=tail, BRANCH_MASKS=branch)
    x = make_inputs(seqlen_q=length_q, seqlen_k=length_k, heads_q=2, heads_kv=1, head_dim=16, dtype=torch.bfloat16,
                    device=DEVICE)
    assert_right(x, window=window, config=config)


@triton.jit
def _divide_kernel(Dividends, By, Quotient, Rest, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    by = tl.load(By)
    quotient, rest = divide(tl.load(Dividends + at), by, tl.full([], 0xFFFFFFFF, tl.uint32) // by.to(tl.uint32))
    tl.store(Quotient + at, quotient)
    tl.store(Rest + at, rest)


@pytest.mark.parametrize("by", [1, 2, 3, 7, 64, 641, 16384, 65537, 2**31 - 1])
def test_division_by_a_product(by: int) -> None:
    """At the multiples of ``by`` and right before them, up to the largest int32, where rounding would show."""
    draw = random.Random(by)
    most = (2**31 - 1) // by
    multiples = [by * draw.randint(0, most) for _ in range(61)] + [by * most]
    values = [0, 1, 2**31 - 1, *(x for m in multiples for x in (m, max(m - 1, 0)))]
    i = torch.tensor(values + [0] * (128 - len(values)), dtype=torch.int32, device=DEVICE)
    quotient, rest = torch.full_like(i, -1), torch.full_like(i, -1)
    _divide_kernel[(1,)](i, torch.tensor([by], dtype=torch.int32, device=DEVICE), quotient, rest, BLOCK=128)
    assert quotient.tolist() == [x // by for x in i.tolist()]
    assert rest.tolist() == [x % by for x in i.tolist()]


@pytest.mark.parametrize(("pack", "tma", "split"), [
    (False, False, True), (True, False, True), (False, True, True), (True, True, False), (True, False, False)])
@pytest.mark.parametrize(("seqlens", "seqlens_k", "heads_kv"), [
    ([5, 0, 33, 1], None, 1), ([0, 0, 7], None, 2), ([20, 3, 0, 9], [31, 3, 4, 0], 2), ([32, 32], None, 1)])
def test_varlen(
    seqlens: list[int], seqlens_k: list[int] | None, heads_kv: int, pack: bool, tma: bool, split: bool
) -> None:
    x = make_inputs(heads_q=2 * heads_kv, heads_kv=heads_kv, head_dim=16, dtype=torch.bfloat16, device=DEVICE,
                    seqlens=seqlens, seqlens_k=seqlens_k)
    config = tiles(32 if tma else 16, 32, PACK_GQA=pack, TMA=tma and HAS_TMA, REGISTER_A=tma, SPLIT_LOOPS=split,
                   BRANCH_MASKS=not split, TAIL_N=0 if split else 16)
    for window in (None, 6):
        assert_right(x, window=window, config=config)


@pytest.mark.parametrize(("tma", "branch"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("window", [None, 9])
def test_packed_sequences_do_not_see_each_other(window: int | None, tma: bool, branch: bool) -> None:
    """Not even what is not a number in the rows right after a sequence, which its last tiles reach into."""
    config = tiles(32, 32, TMA=tma and HAS_TMA, REGISTER_A=tma, SPLIT_LOOPS=window is None and not branch,
                   BRANCH_MASKS=branch, TAIL_N=16 if branch else 0)
    x = make_inputs(heads_q=2, heads_kv=1, head_dim=16, dtype=torch.float16, device=DEVICE, seqlens=[37, 20, 45])
    clean = run_kernels(x, window=window, config=config)
    poisoned = {name: getattr(x, name).clone() for name in ("q", "k", "v", "do")}
    for tensor in poisoned.values():
        tensor[37:57] = float("nan")
    found = run_kernels(type(x)(**vars(x) | poisoned), window=window, config=config)
    for name in ("o", "dq", "dk", "dv"):
        for rows in (slice(0, 37), slice(57, None)):
            assert torch.equal(found[name][rows], clean[name][rows]), name


@pytest.mark.parametrize("seqlens", [[1, 0, 2] + [1] * 6 + [0] * 20 + [20, 3], [0] * 30 + [20] + [0] * 4 + [3]])
def test_many_sequences_most_of_them_empty(seqlens: list[int]) -> None:
    x = make_inputs(heads_q=1, heads_kv=1, head_dim=16, dtype=torch.bfloat16, device=DEVICE, seqlens=seqlens)
    assert_right(x, config=tiles(16, 16))


@pytest.mark.parametrize("values", [[0, 1000, 20], [-5, 7, 20], [0, 20, 20], [15, 3, 9]])
def test_wrong_cu_seqlens_stay_in_bounds(values: list[int]) -> None:
    """What they point at is wrong, so results are; but only in memory that belongs to the call."""
    x = make_inputs(heads_q=2, heads_kv=1, head_dim=16, dtype=torch.float16, device=DEVICE, seqlens=[12, 8])
    assert x.cu_seqlens_q is not None and x.cu_seqlens_k is not None
    x.cu_seqlens_q.copy_(torch.tensor(values))
    x.cu_seqlens_k.copy_(torch.tensor(values))
    run_kernels(x, window=5, config=tiles(16, 16))
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def tuned_tiles() -> list[Any]:
    """Every portable configuration of the packaged tables, once per head dims, group and kind of window."""
    found = {}
    for path in sorted((Path(dispatch.__file__).parent / "tuned").glob("*.json")):
        for entry in json.loads(path.read_text())["entries"]:
            key, kernel = entry["key"], entry["kernel"]
            if kernel not in PORTABLE:
                continue
            window = None if key["window"] is None else 700 if key["window"] >= 512 else 93
            group = key["heads_q"] // key["heads_kv"]
            what = (kernel, key["head_dim"], key["head_dim_v"], group, window, key["varlen"])
            found[(*what, json.dumps(entry["config"], sort_keys=True))] = pytest.param(
                *what, TileConfig.from_dict(entry["config"]), id=f"{len(found)}-{'-'.join(map(str, what))}")
    return list(found.values())


@needs_cuda
@pytest.mark.parametrize(("kernel", "head_dim", "head_dim_v", "group", "window", "varlen", "tile"), tuned_tiles())
def test_what_the_tuned_tables_choose_at_lengths_that_no_tile_divides(
    kernel: str, head_dim: int, head_dim_v: int, group: int, window: int | None, varlen: bool, tile: TileConfig
) -> None:
    lengths: dict[str, Any] = ({"seqlens": [333, 0, 1, 450]} if varlen else {"seqlen_q": 333, "seqlen_k": 777})
    x = make_inputs(**lengths, heads_q=2 * group, heads_kv=2, head_dim=head_dim, head_dim_v=head_dim_v,
                    dtype=torch.bfloat16, device=DEVICE)
    assert_right(x, window=window, config=AttnConfig(**{kernel: tile}))  # type: ignore[arg-type]


def test_backward_is_bitwise_repeatable() -> None:
    x = make_inputs(batch=2, seqlen_q=90, heads_q=6, heads_kv=2, head_dim=32, dtype=torch.bfloat16, device=DEVICE)
    first, second = run_kernels(x, window=40), run_kernels(x, window=40)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_strides_are_read_in_place() -> None:
    """q, k and v sliced from one packed projection, a (batch, heads, seqlen, dim) layout, and an odd storage offset."""
    whole = torch.randn(2, 45, (4 + 2 + 2) * 24, dtype=torch.float16, device=DEVICE)
    q, k, v = (whole[..., a:b].unflatten(-1, (-1, 24)) for a, b in ((0, 96), (96, 144), (144, 192)))
    x = make_inputs(batch=2, seqlen_q=45, heads_q=4, heads_kv=2, head_dim=24, dtype=torch.float16, device=DEVICE)
    do = torch.randn(2, 4, 45, 24, dtype=torch.float16, device=DEVICE).transpose(1, 2)
    shifted = torch.randn(2 * 45 * 2 * 24 + 1, dtype=torch.float16, device=DEVICE)[1:].view(2, 45, 2, 24)
    for value in (v, shifted):
        strided = type(x)(**{**vars(x), "q": q, "k": k, "v": value, "do": do})
        assert_right(strided, window=17, config=tiles(32, 16))


@needs_cuda
@pytest.mark.parametrize("impl", ["triton", None])
def test_more_than_two_to_the_31_elements(impl: Literal["triton"] | None) -> None:
    """The last sequence's last rows lie beyond what a 32-bit offset reaches."""
    batch, length, heads, dim = 3, 8192, 128, 256
    q = torch.empty(batch, length * 3, heads, dim, dtype=torch.bfloat16, device=DEVICE)
    assert q.numel() > 2**31
    tail = make_inputs(seqlen_q=320, heads_q=heads, heads_kv=heads, head_dim=dim, dtype=torch.bfloat16, device=DEVICE)
    q[:, -320:] = tail.q
    from flash_sink_attn import flash_sink_attn_func

    k, v = (t.expand(batch, -1, -1, -1) for t in (tail.k, tail.v))
    if impl is None:  # whatever the card's own choice is: the copy engine reads no strides of 0
        k, v = k.contiguous(), v.contiguous()
    whole = flash_sink_attn_func(q, k, v, tail.sinks, 40, impl=impl)
    part = flash_sink_attn_func(tail.q, tail.k, tail.v, tail.sinks, 40, impl=impl)
    if impl is None:  # another length may be given other tiles
        assert (whole[-1, -320:] - part[0]).abs().max() <= 2**-7 * part.abs().max()
    else:
        assert torch.equal(whole[-1, -320:], part[0])
    assert (whole[-1, :-320] == 0).all()


def gradients_of_first_and_last_head(impl: Literal["triton"] | None, **shape: int) -> list[str]:
    """What is wrong with them and with the output, by the error rule."""
    from flash_sink_attn import flash_sink_attn_func

    x = make_inputs(**shape, dtype=torch.bfloat16, device=DEVICE)  # type: ignore[arg-type]
    assert x.sinks is not None
    some = [0, shape["heads_q"] - 1]
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v, x.sinks)]
    o, lse = flash_sink_attn_func(*leaves, 40, return_lse=True, impl=impl)
    grads = torch.autograd.grad(o, leaves, x.do)
    outputs = {name: t.detach()[:, :, some].clone() for name, t in zip(("o", "dq", "dk", "dv"), (o, *grads),
                                                                       strict=False)}
    outputs |= {"lse": lse.detach()[:, some].clone(), "dsinks": grads[3][some]}
    del o, lse, grads
    part = type(x)(**vars(x) | {name: getattr(x, name).detach()[:, :, some].clone() for name in ("q", "k", "v", "do")}
                   | {"sinks": x.sinks.detach()[some]})
    del x, leaves  # the reference needs the room
    return [c.message for c in check(outputs, *truth_and_eager(part, window=40), torch.bfloat16).values() if not c.ok]


@needs_cuda
@pytest.mark.parametrize("impl", ["triton", None])
def test_gradients_of_more_than_two_to_the_31_elements(impl: Literal["triton"] | None) -> None:
    """Queries, keys, values and all their gradients; the last sequence lies beyond what a 32-bit offset reaches."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("needs 64 GB of free GPU memory")
    shape = {"batch": 3, "seqlen_q": 3 * 8192, "heads_q": 128, "heads_kv": 128, "head_dim": 256}
    assert math.prod(shape[name] for name in ("batch", "seqlen_q", "heads_q", "head_dim")) > 2**31
    wrong = gradients_of_first_and_last_head(impl, **shape)
    torch.cuda.empty_cache()  # for whoever shares the card
    assert not wrong, "; ".join(wrong)


def test_the_judge_of_first_and_last_head() -> None:
    assert gradients_of_first_and_last_head(
        "triton", batch=2, seqlen_q=45, heads_q=3, heads_kv=3, head_dim=16) == []


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_a_gpu_that_is_not_the_current_one(impl: Literal["triton", "hopper"], varlen: bool) -> None:
    """Forward and backward; the first call is done in full, the second is a replay."""
    from flash_sink_attn import flash_sink_attn_func, flash_sink_attn_varlen_func

    other = torch.device("cuda", 1)
    if impl == "hopper" and (problem := support.device_problem(other)) is not None:
        pytest.skip(problem)
    lengths: dict[str, Any] = {"seqlens": [100, 0, 200]} if varlen else {"batch": 2, "seqlen_q": 300}

    def results(x: AttentionInputs, device: torch.device) -> list[torch.Tensor]:
        leaves = [t.to(device).requires_grad_() for t in (x.q, x.k, x.v, x.sinks) if t is not None]
        options: dict[str, Any] = {"impl": impl, "deterministic": True}
        if x.cu_seqlens_q is None:
            o = flash_sink_attn_func(*leaves, 64, **options)
        else:
            o = flash_sink_attn_varlen_func(*leaves, x.cu_seqlens_q.to(device), 64, **options)
        found = [o, *torch.autograd.grad(o, leaves, x.do.to(device))]
        assert {t.device for t in found} == {device}
        return found

    dispatch.forget()
    assert torch.cuda.current_device() == 0
    for seed in (1, 2):
        x = make_inputs(heads_q=4, heads_kv=2, head_dim=64, dtype=torch.float16, device=other, seed=seed, **lengths)
        away = results(x, other)
        assert torch.cuda.current_device() == 0
        for a, b in zip(away, results(x, torch.device("cuda", 0)), strict=True):
            assert torch.equal(a.to("cuda:0"), b)
