"""The public functions: errors, upstream's calls, autograd in all its settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flash_sink_attn import (
    AttnConfig,
    SinkCacheManager,
    SlidingCacheManager,
    TileConfig,
    flash_sink_attn_func,
    flash_sink_attn_varlen_func,
)
from flash_sink_attn.testing import check, make_inputs, truth_and_eager
from tests.kernel_calls import DEVICE


def inputs(**changes: Any) -> Any:
    return make_inputs(**({"batch": 2, "seqlen_q": 37, "heads_q": 4, "heads_kv": 2, "head_dim": 16,
                           "dtype": torch.bfloat16, "device": DEVICE} | changes))


def leaves(x: Any) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.sinks)]


def varlen_inputs() -> Any:
    return inputs(seqlens=[9, 0, 21, 1])


@pytest.mark.parametrize("sinks_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outputs_and_gradients(sinks_dtype: torch.dtype) -> None:
    x = inputs()
    x.sinks.copy_(x.sinks.to(sinks_dtype))
    q, k, v, sinks = leaves(x)
    sinks = sinks.detach().to(sinks_dtype).requires_grad_()
    o, lse = flash_sink_attn_func(q, k, v, sinks, 12, return_lse=True)
    dlse = torch.randn_like(lse)
    grads = torch.autograd.grad([o, lse], [q, k, v, sinks], [x.do, dlse])
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3 + [sinks_dtype]
    truth, eager = truth_and_eager(x, window=12, dlse=dlse)
    found = dict(zip(("o", "lse", "dq", "dk", "dv", "dsinks"), (o, lse, *grads), strict=True))
    wrong = [c.message for c in check(found, truth, eager, torch.bfloat16).values() if not c.ok]
    assert not wrong


def test_varlen_outputs_and_gradients() -> None:
    x = varlen_inputs()
    q, k, v, sinks = leaves(x)
    o, lse = flash_sink_attn_varlen_func(q, k, v, sinks, x.cu_seqlens_q, 12, return_lse=True, max_seqlen_q=21)
    grads = torch.autograd.grad([o, lse], [q, k, v, sinks], [x.do, torch.zeros_like(lse)])
    truth, eager = truth_and_eager(x, window=12)
    found = dict(zip(("o", "lse", "dq", "dk", "dv", "dsinks"), (o, lse, *grads), strict=True))
    wrong = [c.message for c in check(found, truth, eager, torch.bfloat16).values() if not c.ok]
    assert not wrong


def test_varlen_equals_fixed_length_sequence_by_sequence() -> None:
    x = varlen_inputs()
    packed = flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, x.cu_seqlens_q, 12)
    for begin, end in ((0, 9), (9, 30), (30, 31)):
        alone = flash_sink_attn_func(*(t[None, begin:end] for t in (x.q, x.k, x.v)), x.sinks, 12)
        assert torch.equal(packed[begin:end], alone[0])


def test_cu_seqlens_on_the_cpu_and_of_the_keys() -> None:
    x = inputs(seqlens=[5, 3], seqlens_k=[8, 9])
    expected = flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, x.cu_seqlens_q, cu_seqlens_k=x.cu_seqlens_k)
    found = flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, x.cu_seqlens_q.cpu(), cu_seqlens_k=x.cu_seqlens_k.cpu())
    assert torch.equal(expected, found)
    alone = flash_sink_attn_func(x.q[None, 5:], x.k[None, 8:], x.v[None, 8:], x.sinks)
    assert torch.equal(found[5:], alone[0])


def test_calls_of_the_original_interface() -> None:
    x = inputs()
    manager = SlidingCacheManager(12)
    manager.update(x.k, x.v)
    expected = flash_sink_attn_func(x.q, x.k, x.v, x.sinks, 12)
    junk = torch.zeros_like(x.k)
    assert torch.equal(flash_sink_attn_func(x.q, junk, junk, x.sinks, manager), expected)
    assert torch.equal(flash_sink_attn_func(x.q, junk, junk, x.sinks, manager, False), expected)
    manager.reset()
    with pytest.raises(ValueError, match=r"window: .*update\(k, v\)"):
        flash_sink_attn_func(x.q, x.k, x.v, x.sinks, manager)
    y = varlen_inputs()
    for window in (12, None):
        varlen_manager = SinkCacheManager(window)
        varlen_manager.update(y.k, y.v)
        expected = flash_sink_attn_varlen_func(y.q, y.k, y.v, y.sinks, y.cu_seqlens_q, window)
        found = flash_sink_attn_varlen_func(y.q, y.k, y.v, y.sinks, y.cu_seqlens_q, varlen_manager, True)
        assert torch.equal(found, expected)


def test_gradients_reach_a_managers_keys() -> None:
    x = inputs()
    q, k, v, sinks = leaves(x)
    manager = SlidingCacheManager(None)
    manager.update(k, v)
    flash_sink_attn_func(q, k, v, sinks, manager).backward(x.do)
    expected = torch.autograd.grad(flash_sink_attn_func(q, k, v, sinks), [q, k, v, sinks], x.do)
    for leaf, grad in zip((q, k, v, sinks), expected, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, grad)


def test_only_some_inputs_need_gradients() -> None:
    x = inputs(batch=1, heads_q=2, heads_kv=1)
    everything = leaves(x)
    expected = torch.autograd.grad(flash_sink_attn_func(*everything, 12), everything, x.do)
    for wanted in [(0,), (1,), (2,), (3,), (0, 3), (1, 2), (2, 3)]:
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(everything)]
        found = torch.autograd.grad(flash_sink_attn_func(*some, 12), [some[i] for i in wanted], x.do)
        for i, grad in zip(wanted, found, strict=True):
            torch.testing.assert_close(grad, expected[i], rtol=0, atol=0 if i != 3 else 1e-5)


@pytest.mark.parametrize("make", [lambda s: s.repeat_interleave(2)[::2], lambda s: s[:1].expand(4)],
                         ids=["strided", "expanded"])
def test_sinks_of_any_stride(make: Any) -> None:
    x = inputs()
    q, k, v, _ = leaves(x)
    results = []
    for copy in (False, True):
        base = x.sinks.detach().clone().requires_grad_()
        sinks = make(base).contiguous() if copy else make(base)
        assert sinks.is_contiguous() == copy
        o = flash_sink_attn_func(q, k, v, sinks, 12)
        results.append([o, *torch.autograd.grad(o, [q, k, v, base], x.do)])
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


BEYOND = [50, 2**31 - 30, 2**31 - 1, 2**40]  # all keys of the next two tests; the sums of some leave 32 bits


@pytest.mark.parametrize("lengths", [(37, 37), (40, 17)])
def test_a_window_beyond_the_keys_is_none(lengths: tuple[int, int]) -> None:
    x = inputs(batch=1, heads_q=2, heads_kv=1, seqlen_q=lengths[0], seqlen_k=lengths[1])

    def results(window: int | None) -> list[torch.Tensor]:
        some = leaves(x)
        o = flash_sink_attn_func(*some, window)
        return [o, *torch.autograd.grad(o, some, x.do)]

    none = results(None)
    for window in BEYOND:
        assert all(map(torch.equal, results(window), none)), window


def test_a_window_beyond_the_keys_of_a_packed_batch_is_none() -> None:
    x = varlen_inputs()
    expected = flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, x.cu_seqlens_q)
    for window in BEYOND:
        found = flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, x.cu_seqlens_q, window)
        assert torch.equal(found, expected), window


def test_no_sinks_is_sinks_at_minus_infinity() -> None:
    x = inputs()
    nowhere = torch.full_like(x.sinks, float("-inf"))
    assert torch.equal(flash_sink_attn_func(x.q, x.k, x.v), flash_sink_attn_func(x.q, x.k, x.v, nowhere))


def test_nothing_to_do() -> None:
    for shape in ({"batch": 0}, {"seqlen_q": 0, "seqlen_k": 5}):
        x = inputs(**shape)
        q, k, v, sinks = leaves(x)
        o = flash_sink_attn_func(q, k, v, sinks)
        assert o.shape == q.shape
        grads = torch.autograd.grad(o, [q, k, v, sinks], x.do)
        assert all((g == 0).all() for g in grads)
    x = inputs(seqlen_q=6, seqlen_k=0)
    q, k, v, sinks = leaves(x)
    o = flash_sink_attn_func(q, k, v, sinks)
    assert (o == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(o, [q, k, v, sinks], x.do))


def test_without_gradients_the_outputs_are_the_same_bits_and_no_graph_is_kept() -> None:
    x = make_inputs(seqlen_q=70, heads_q=4, heads_kv=2, head_dim=32, dtype=torch.float16, device=DEVICE)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    noted = flash_sink_attn_func(*leaves, x.sinks, 40, return_lse=True)
    with torch.no_grad():
        within = flash_sink_attn_func(*leaves, x.sinks, 40, return_lse=True)
    plain = flash_sink_attn_func(x.q, x.k, x.v, x.sinks, 40, return_lse=True)
    assert all(t.grad_fn is not None for t in noted)
    for ours in (within, plain):
        assert all(t.grad_fn is None and not t.requires_grad for t in ours)
        assert all(torch.equal(a, b) for a, b in zip(ours, noted, strict=True))
    with torch.inference_mode():
        assert torch.equal(flash_sink_attn_func(x.q, x.k, x.v, x.sinks, 40), plain[0])


def test_derivatives_that_there_are_not_are_refused_and_not_left_out() -> None:
    x = make_inputs(seqlen_q=20, heads_q=2, heads_kv=2, head_dim=32, dtype=torch.float16, device=DEVICE)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"):
        flash_sink_attn_func(forward_ad.make_dual(x.q, torch.ones_like(x.q)), x.k, x.v, x.sinks)
    for transform, q in ((torch.func.vmap, x.q[None]), (torch.func.grad, x.q)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="functorch"):
            transform(lambda q: flash_sink_attn_func(q, x.k, x.v, x.sinks).sum().float())(q)


def test_checkpointing() -> None:
    x = inputs()
    expected = torch.autograd.grad(flash_sink_attn_func(*(plain := leaves(x)), 12), plain, x.do)
    again = leaves(x)
    o = checkpoint(flash_sink_attn_func, *again, 12, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(o, again, x.do), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("order", [(None, "dense", "across"), ("across", None, "dense")])
def test_saved_tensors_with_other_strides(varlen: bool, order: tuple[str | None, ...]) -> None:
    """What a saved-tensor hook hands to the backward is laid out as the hook likes; here o and lse as well."""
    x = varlen_inputs() if varlen else inputs()
    packed = torch.cat([x.q, x.k, x.v], -2).requires_grad_()
    q, k, v = packed.split([4, 2, 2], -2)
    ways: dict[str | None, Any] = {
        None: lambda t: t, "dense": lambda t: t.clone(memory_format=torch.contiguous_format),
        "across": lambda t: t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)}
    results = []
    for way in order:
        with torch.autograd.graph.saved_tensors_hooks(ways[way], lambda t: t):
            o = (flash_sink_attn_varlen_func(q, k, v, x.sinks, x.cu_seqlens_q, 12) if varlen
                 else flash_sink_attn_func(q, k, v, x.sinks, 12))
        results.append(torch.autograd.grad(o, [packed], x.do, retain_graph=True)[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_autocast() -> None:
    x = inputs()
    q, k, v = (t.float().requires_grad_() for t in (x.q, x.k, x.v))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        o = flash_sink_attn_func(q, k, v, x.sinks, 12)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, flash_sink_attn_func(x.q, x.k, x.v, x.sinks, 12))
    o.backward(x.do)
    assert q.grad is not None and q.grad.dtype == torch.float32


@pytest.mark.parametrize("varlen", [False, True])
def test_compile_without_a_graph_break(varlen: bool) -> None:
    x = inputs(batch=1, heads_q=2, heads_kv=1, seqlens=[9, 0, 21] if varlen else None)
    tile = TileConfig(16, 32)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> Any:
        if varlen:
            return flash_sink_attn_varlen_func(q * 1, k, v, sinks, x.cu_seqlens_q, 12, return_lse=True, config=tile)
        return flash_sink_attn_func(q * 1, k, v, sinks, 12, return_lse=True, config=tile)

    torch._dynamo.reset()
    results = []
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        q, k, v, sinks = leaves(x)
        k.requires_grad_(False)
        o, lse = f(q, k, v, sinks)
        results.append([o, lse, *torch.autograd.grad([o, lse], [q, v, sinks], [x.do, torch.ones_like(lse)])])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_compile_with_a_scale_that_varies() -> None:
    x = inputs()

    def call(scale: float, *tensors: torch.Tensor) -> Any:
        return flash_sink_attn_func(*tensors, 12, softmax_scale=scale)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for scale in (0.3, 0.4, 0.5):
        results = []
        for f in (call, compiled):
            some = leaves(x)
            o = f(scale, *some)
            results.append([o, *torch.autograd.grad(o, some, x.do)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("both", [True, False], ids=["both maxima", "only max_seqlen_q"])
def test_compile_with_a_maximum_that_only_the_device_knows(both: bool) -> None:
    x = varlen_inputs()

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, less: int) -> Any:
        longest = int(x.cu_seqlens_q.diff().max()) - less
        return flash_sink_attn_varlen_func(q, k, v, sinks, x.cu_seqlens_q, 12, max_seqlen_q=longest,
                                           max_seqlen_k=longest if both else None)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for f in (call, compiled):
            some = leaves(x)
            o = f(*some, 0)
            results.append([o, *torch.autograd.grad(o, some, x.do)])
        with pytest.raises(ValueError, match="max_seqlen_q: expected an int of at least 0 or None, got -9"):
            compiled(*leaves(x), 30)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_op_registrations() -> None:
    x = inputs(batch=1, seqlen_q=18)
    q, k, v, sinks = leaves(x)
    arguments = (q, k, v, sinks, None, None, 0, 0, 5, 0.25, "")
    torch.library.opcheck(torch.ops.flash_sink_attn.forward, arguments,
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_config_is_used_and_checked() -> None:
    x = inputs()
    expected = flash_sink_attn_func(x.q, x.k, x.v, x.sinks)
    for config in (TileConfig(16, 64), AttnConfig(fwd=TileConfig(32, 16)), {"fwd": {"BLOCK_M": 16, "BLOCK_N": 16}},
                   {"fwd": TileConfig(16, 16)}):
        found = flash_sink_attn_func(x.q, x.k, x.v, x.sinks, config=config)
        torch.testing.assert_close(found, expected, atol=2**-7, rtol=2**-7)
    for bad, words in ((TileConfig(48, 64), "fwd: BLOCK_M must be one of .* got 48"),
                       (AttnConfig(bwd_dkdv=TileConfig(64, 64, PACK_GQA=True)), "bwd_dkdv: PACK_GQA"),
                       ({"forward": {}}, "unknown kernel 'forward'"), ({"fwd": {"BLOCK": 1}}, "unknown field 'BLOCK'")):
        with pytest.raises(ValueError, match=f"config: {words}"):
            flash_sink_attn_func(x.q, x.k, x.v, x.sinks, config=bad)
    with pytest.raises(TypeError, match="config: expected an AttnConfig, .* got int"):
        flash_sink_attn_func(x.q, x.k, x.v, x.sinks, config=64)


ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q: expected a tensor, got list", {"q": [1.0]}),
    (ValueError, r"q: expected 4 dimensions .* got shape \(37, 4, 16\)", {"q": lambda x: x.q[0]}),
    (TypeError, "q: expected float16 or bfloat16, got torch.float32", {"q": lambda x: x.q.float()}),
    (TypeError, "v: expected q's dtype torch.bfloat16, got torch.float16", {"v": lambda x: x.v.half()}),
    (ValueError, "k: expected q's device .* got meta", {"k": lambda x: x.k.to("meta")}),
    (ValueError, "q: expected a head dim that is a multiple of 8 .* got 12", {"q": lambda x: x.q[..., :12]}),
    (ValueError, "k: expected q's head dim 16, got 8", {"k": lambda x: x.k[..., :8]}),
    (ValueError, r"v: expected k's leading dimensions .* got \(2, 30, 2\)", {"v": lambda x: x.v[:, :30]}),
    (ValueError, "k: expected q's batch 2, got 1", {"k": lambda x: x.k[:1], "v": lambda x: x.v[:1]}),
    (ValueError, "q: expected a number of heads that is a multiple of k's 2, got 3", {"q": lambda x: x.q[:, :, :3]}),
    (TypeError, "sinks: expected a tensor or None, got float", {"sinks": 0.0}),
    (ValueError, r"sinks: expected shape \(4,\), .* got \(3,\)", {"sinks": lambda x: x.sinks[:3]}),
    (TypeError, "sinks: expected float32, float16 or bfloat16, got torch.float64",
     {"sinks": lambda x: x.sinks.double()}),
    (ValueError, "window: expected at least 1 .* got 0", {"window": 0}),
    (TypeError, "window: expected an int, None or a cache manager, got 2.5", {"window": 2.5}),
    (TypeError, "window: expected an int, None or a cache manager, got True", {"window": True}),
    (ValueError, "softmax_scale: expected a finite number above 0, got 0", {"softmax_scale": 0}),
    (ValueError, "softmax_scale: expected a finite number above 0, got -1.0", {"softmax_scale": -1.0}),
    (ValueError, "softmax_scale: expected a finite number above 0, got nan", {"softmax_scale": float("nan")}),
    (ValueError, "softmax_scale: expected a finite number above 0, got inf", {"softmax_scale": float("inf")}),
    (TypeError, "softmax_scale: expected a float or None, got 'x'", {"softmax_scale": "x"}),
    (TypeError, "softmax_scale: expected a float or None, got True", {"softmax_scale": True}),
]


@pytest.mark.parametrize(("error", "words", "changes"), ERRORS, ids=[words for _, words, _ in ERRORS])
def test_bad_input(error: type[Exception], words: str, changes: dict[str, Any]) -> None:
    x = inputs()
    arguments = {"q": x.q, "k": x.k, "v": x.v, "sinks": x.sinks}
    arguments |= {name: value(x) if callable(value) else value for name, value in changes.items()}
    with pytest.raises(error, match=words):
        flash_sink_attn_func(**arguments)


VARLEN_ERRORS: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (TypeError, "cu_seqlens: expected a tensor, got list", [0, 31], {}),
    (TypeError, "cu_seqlens: expected int32, got torch.int64", torch.tensor([0, 31]), {}),
    (ValueError, r"cu_seqlens: expected shape \(batch \+ 1,\) .* got \(1,\)", torch.tensor([0], dtype=torch.int32), {}),
    (ValueError, r"cu_seqlens: expected values that rise from 0 .* got \[0, 40, 31\]",
     torch.tensor([0, 40, 31], dtype=torch.int32), {}),
    (ValueError, r"cu_seqlens: expected values .* 31 tokens, got \[0, 30\]",
     torch.tensor([0, 30], dtype=torch.int32), {}),
    (ValueError, r"cu_seqlens_k: expected cu_seqlens's shape \(2,\), got \(3,\)",
     torch.tensor([0, 31], dtype=torch.int32), {"cu_seqlens_k": torch.tensor([0, 1, 31], dtype=torch.int32)}),
    (ValueError, "max_seqlen_q: expected an int of at least 0 or None, got -1",
     torch.tensor([0, 31], dtype=torch.int32), {"max_seqlen_q": -1}),
]


@pytest.mark.parametrize(("error", "words", "cu_seqlens", "changes"), VARLEN_ERRORS,
                         ids=[e[1][:40] for e in VARLEN_ERRORS])
def test_bad_varlen_input(error: type[Exception], words: str, cu_seqlens: Any, changes: dict[str, Any]) -> None:
    x = varlen_inputs()
    with pytest.raises(error, match=words):
        flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, cu_seqlens, **changes)


def test_keys_of_other_length_need_their_own_cu_seqlens() -> None:
    x = varlen_inputs()
    with pytest.raises(ValueError, match="cu_seqlens_k: expected a tensor, since k has 20 tokens and q 31"):
        flash_sink_attn_varlen_func(x.q, x.k[:20], x.v[:20], x.sinks, x.cu_seqlens_q)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_values_on_the_gpu_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    x = varlen_inputs()
    wrong = torch.tensor([0, 40, 31], dtype=torch.int32, device=DEVICE)
    flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, wrong)
    monkeypatch.setenv("FLASH_SINK_ATTN_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens: expected values that rise"):
        flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, wrong)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_cuda_graph_capture() -> None:
    x = inputs()
    q, k, v, sinks = leaves(x)
    expected = torch.autograd.grad(flash_sink_attn_func(q, k, v, sinks, 12), [q, k, v, sinks], x.do)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(flash_sink_attn_func(q, k, v, sinks, 12), [q, k, v, sinks], x.do)
    for grad in found:
        grad.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
