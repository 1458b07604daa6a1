"""The sink on top of FlashAttention, with FlashAttention's interfaces re-enacted in float64 on the CPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from flash_sink_attn import _checks
from flash_sink_attn.flash_attn_with_sink import (
    FlashAttention2,
    FlashAttention3,
    FlashCall,
    apply_sink,
    flash_attn_with_sink_func,
    sink_gradient,
)
from flash_sink_attn.reference import attention_reference_gradients

INFINITY = float("inf")


@pytest.fixture(autouse=True)
def float64_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention is re-enacted in float64, where every error is one of the formulas."""
    monkeypatch.setattr(_checks, "HALF", (*_checks.HALF, torch.float64))


# --- FlashAttention's own behaviour, written down independently: it is told lse and output in its backward ---

def scores_of(q, k, scale, causal, left, right, slopes):
    """(batch, heads, rows, keys) with minus infinity where masked."""
    heads, rows, keys = q.shape[2], q.shape[1], k.shape[1]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    distance = torch.arange(keys)[None, :] - (torch.arange(rows)[:, None] + keys - rows)
    if slopes is not None:
        s = s - slopes.to(s.dtype).reshape(-1, heads)[:, :, None, None] * distance.abs()
    if causal:
        right = 0
    if right >= 0:
        s = s.masked_fill(distance > right, -INFINITY)
    if left >= 0:
        s = s.masked_fill(distance < -left, -INFINITY)
    return s


def kept(shape, dropout_p, rng_state):
    generator = torch.Generator().manual_seed(int(rng_state[0]))
    return (torch.rand(shape, generator=generator) >= dropout_p).double() / (1 - dropout_p)


def fa_forward(q, k, v, dropout_p, softmax_scale, causal, left, right, slopes):
    s = scores_of(q, k, softmax_scale, causal, left, right, slopes)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse[..., None]).nan_to_num(0.0)
    rng_state = torch.tensor([7, 0])
    if dropout_p:
        p = p * kept(p.shape, dropout_p, rng_state)
    out = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(q.shape[2] // v.shape[2], dim=2))
    return out.to(q.dtype), lse.masked_fill(lse == -INFINITY, INFINITY), rng_state


def fa_backward(do, q, k, v, out, lse, dq, dk, dv, dropout_p, softmax_scale, causal, left, right, slopes, rng_state):
    group = q.shape[2] // k.shape[2]
    s = scores_of(q, k, softmax_scale, causal, left, right, slopes)
    p = torch.exp(s - lse[..., None])
    dropped = torch.ones_like(p)
    if dropout_p:
        dropped = kept(p.shape, dropout_p, rng_state)
    delta = (out * do).sum(-1).transpose(1, 2)[..., None]
    dp = torch.einsum("bihd,bjhd->bhij", do, v.repeat_interleave(group, 2)) * dropped
    ds = p * (dp - delta) * softmax_scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", ds, k.repeat_interleave(group, 2)))
    dk.copy_(torch.einsum("bhij,bihd->bjhd", ds, q).unflatten(2, (-1, group)).sum(3))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", p * dropped, do).unflatten(2, (-1, group)).sum(3))


def by_sequence(cu):
    ends = cu.tolist()
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def flash_attention_2() -> ModuleType:
    """The interface of flash_attn 2.8."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                            alibi_slopes, return_softmax):
        out, lse, rng_state = fa_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left,
                                         window_size_right, alibi_slopes)
        return out, lse, torch.empty(0), rng_state

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                             window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
                             rng_state=None):
        module.deterministic = deterministic
        fa_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                    window_size_right, alibi_slopes, rng_state)

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                   softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
                                   alibi_slopes=None, return_softmax=False, block_table=None):
        parts = [_flash_attn_forward(q[None, s], k[None, s], v[None, s], dropout_p, softmax_scale, causal,
                                     window_size_left, window_size_right, softcap, alibi_slopes, False)
                 for s in by_sequence(cu_seqlens_q)]
        return (torch.cat([p[0][0] for p in parts]), torch.cat([p[1][0] for p in parts], 1), torch.empty(0),
                torch.tensor([7, 0]))

    def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                    max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                                    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
        for s in by_sequence(cu_seqlens_q):
            _flash_attn_backward(dout[None, s], q[None, s], k[None, s], v[None, s], out[None, s],
                                 softmax_lse[None, :, s], dq[None, s], dk[None, s], dv[None, s], dropout_p,
                                 softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                                 deterministic, rng_state)

    for function in (_flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward,
                     _flash_attn_varlen_backward):
        setattr(module, function.__name__, function)
    return module


def flash_attention_2_6() -> ModuleType:
    """The interface of flash_attn 2.6: window_size as a pair, eight results."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                            return_softmax):
        out, lse, rng_state = fa_forward(q, k, v, dropout_p, softmax_scale, causal, *window_size, alibi_slopes)
        return out, q, k, v, out, lse, None, rng_state

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                             window_size, softcap, alibi_slopes, deterministic, rng_state=None):
        fa_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, *window_size,
                    alibi_slopes, rng_state)
        return dq, dk, dv, None

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


def flash_attention_3() -> ModuleType:
    """The interface of FlashAttention-3; its backward is a custom operator there, whose schema names is_causal."""
    module = ModuleType("flash_attn_interface")

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0,
                        deterministic=False, return_attn_probs=False, sinks=None):
        out, lse, _ = fa_forward(q, k, v, 0.0, softmax_scale, causal, *window_size, None)
        if sinks is not None:
            assert sinks.dtype is torch.bfloat16
            out, _ = apply_sink(out, lse, sinks)
        return (out, lse) if return_attn_probs else out

    @torch.library.custom_op("fake_flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
    def _flash_attn_backward(
        dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        softmax_lse: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None, sequed_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None, dq: torch.Tensor | None = None, dk: torch.Tensor | None = None,
        dv: torch.Tensor | None = None, softmax_scale: float | None = None, is_causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, deterministic: bool = False,
    ) -> torch.Tensor:
        fa_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, 0.0, softmax_scale, is_causal, window_size_left,
                    window_size_right, None, None)
        return dout.new_empty(0)

    module.flash_attn_func, module._flash_attn_backward = flash_attn_func, _flash_attn_backward
    return module


@pytest.fixture(scope="module")
def fa3():
    return flash_attention_3()


def install(monkeypatch, *, fa2: ModuleType | None = None, fa3: ModuleType | None = None) -> None:
    """Makes exactly these FlashAttentions importable; None in sys.modules makes an import fail."""
    package = ModuleType("flash_attn")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "flash_attn", package if fa2 else None)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", fa2)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fa3)
    monkeypatch.setitem(sys.modules, "flash_attn_3", None)
    monkeypatch.setitem(sys.modules, "flash_attn_3.flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_config", None)


def draw(rows=11, keys=11, heads=4, heads_kv=2, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    q, k, v, do = (torch.randn(2, n, h, dim, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
                   for n, h in ((rows, heads), (keys, heads_kv), (keys, heads_kv), (rows, heads)))
    sink = torch.tensor([-1.5, 0.3, 2.0, -INFINITY][:heads], dtype=torch.float64).requires_grad_()
    return q, k, v, sink, do.detach()


def literal(q, k, v, sink, *, causal, window_size, scale=None, slopes=None, dropout_p=0.0):
    """A softmax over the scores and one more column, differentiated by autograd."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = scores_of(q, k, scale, causal, *window_size, slopes)
    column = sink.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)
    p = torch.softmax(torch.cat([s, column], -1), -1)[..., :-1]
    if dropout_p:
        p = p * kept(p.shape, dropout_p, torch.tensor([7, 0]))
    return torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(q.shape[2] // v.shape[2], 2))


@pytest.mark.parametrize("interface", ["2.8", "2.6", "3"])
@pytest.mark.parametrize(("rows", "keys", "causal", "window_size"), [
    (11, 11, True, (-1, -1)), (11, 11, True, (3, 0)), (11, 11, False, (-1, -1)), (11, 11, False, (2, 1)),
    (5, 11, True, (-1, -1)), (5, 11, True, (3, -1)),
])
def test_output_and_gradients_are_those_of_a_softmax_with_one_more_column(
        monkeypatch, fa3, interface, rows, keys, causal, window_size):
    modules = {"2.8": {"fa2": flash_attention_2()}, "2.6": {"fa2": flash_attention_2_6()}, "3": {"fa3": fa3}}
    install(monkeypatch, **modules[interface])
    q, k, v, sink, do = draw(rows, keys)
    out = flash_attn_with_sink_func(q, k, v, sink, causal=causal, window_size=window_size)
    expected = literal(q, k, v, sink, causal=causal, window_size=window_size)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(out, (q, k, v, sink), do)
    for got, want in zip(gradients, torch.autograd.grad(expected, (q, k, v, sink), do), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert gradients[3][3] == 0 and gradients[3][:3].abs().min() > 1e-3


def test_against_the_reference_of_the_package(monkeypatch):
    install(monkeypatch, fa2=flash_attention_2())
    q, k, v, sink, do = draw(9, 9)
    out = flash_attn_with_sink_func(q, k, v, sink, causal=True, window_size=(3, 0), softmax_scale=0.7)
    truth = attention_reference_gradients(q.detach(), k.detach(), v.detach(), sink.detach(), do, window=4,
                                          softmax_scale=0.7)
    for name, got in zip(("dq", "dk", "dv", "dsinks"), torch.autograd.grad(out, (q, k, v, sink), do), strict=True):
        torch.testing.assert_close(got, truth[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out, truth["o"], rtol=1e-12, atol=1e-12)


def test_rows_without_a_visible_key_are_zero_with_and_without_a_sink(monkeypatch):
    install(monkeypatch, fa2=flash_attention_2())
    q, k, v, sink, do = draw(rows=9, keys=4)  # rows 0 to 4 see nothing; head 3 has no sink either
    out = flash_attn_with_sink_func(q, k, v, sink, causal=True)
    gradients = torch.autograd.grad(out, (q, k, v, sink), do)
    assert out[:, :5].abs().max() == 0 and gradients[0][:, :5].abs().max() == 0
    assert all(g.isfinite().all() for g in gradients)
    truth = attention_reference_gradients(q.detach(), k.detach(), v.detach(), sink.detach(), do)
    for name, got in zip(("dq", "dk", "dv", "dsinks"), gradients, strict=True):
        torch.testing.assert_close(got, truth[name], rtol=1e-10, atol=1e-12)


def test_dropout_and_alibi_with_flash_attn_2(monkeypatch):
    install(monkeypatch, fa2=flash_attention_2())
    q, k, v, sink, do = draw()
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    options = {"causal": True, "window_size": (6, 0)}
    out = flash_attn_with_sink_func(q, k, v, sink, 0.3, None, True, (6, 0), slopes)
    expected = literal(q, k, v, sink, slopes=slopes, dropout_p=0.3, **options)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    undropped = literal(q, k, v, sink, slopes=slopes, **options)
    assert (out - undropped).abs().max() > 0.1  # the test can tell
    for got, want in zip(torch.autograd.grad(out, (q, k, v, sink), do),
                         torch.autograd.grad(expected, (q, k, v, sink), do), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_half_precision_keeps_dtypes_and_the_shape_of_the_sink(monkeypatch):
    module = flash_attention_2()
    install(monkeypatch, fa2=module)
    q, k, v, sink, do = draw(dtype=torch.bfloat16)
    sink = sink.detach().to(torch.bfloat16).reshape(1, 4, 1, 1).requires_grad_()
    out = flash_attn_with_sink_func(q, k, v, sink, causal=True, deterministic=True)
    dq, dk, dv, dsink = torch.autograd.grad(out, (q, k, v, sink), do)
    assert module.deterministic is True
    assert {t.dtype for t in (out, dq, dk, dv, dsink)} == {torch.bfloat16} and dsink.shape == (1, 4, 1, 1)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    module = flash_attention_2()
    install(monkeypatch, fa2=module)

    def refuse(*_, **__):
        raise AssertionError("q, k and v need no gradient")

    q, k, v, sink, do = draw()
    out = flash_attn_with_sink_func(q.detach(), k.detach(), v.detach(), sink, causal=True)
    module._flash_attn_backward = refuse
    dsink, = torch.autograd.grad(out, sink, do)
    want, = torch.autograd.grad(literal(q, k, v, sink, causal=True, window_size=(-1, -1)), sink, do)
    torch.testing.assert_close(dsink, want)


@pytest.mark.parametrize(("version", "make"), [("2", flash_attention_2), ("2.6", flash_attention_2_6)])
def test_backends_take_the_spelling_of_their_version(version, make):
    q, k, v, sink, do = (t.detach() for t in draw())
    flash, call = FlashAttention2(make()), FlashCall(0.35, True, (4, 0))
    out, lse, _ = flash.forward(q, k, v, call)
    want = scores_of(q, k, 0.35, True, 4, 0, None)
    torch.testing.assert_close(lse, torch.logsumexp(want, -1))
    out, lse = apply_sink(out, lse, sink)
    torch.testing.assert_close(sink_gradient(out, do, lse, sink).shape, sink.shape)


def test_varlen_of_the_backends():
    q, k, v, sink, do = (t.detach() for t in draw())
    cu = torch.tensor([0, 3, 3, 11], dtype=torch.int32)
    flash, call = FlashAttention2(flash_attention_2()), FlashCall(0.35, True, (4, 0), cu_seqlens=cu, max_seqlen=8)
    out, lse, rng_state = flash.forward(q[0], k[0], v[0], call)
    out, lse = apply_sink(out, lse, sink)
    gradients = flash.backward(do[0], q[0], k[0], v[0], out, lse, call, rng_state)
    truth = attention_reference_gradients(q[0], k[0], v[0], sink, do[0], window=5, softmax_scale=0.35, cu_seqlens_q=cu)
    for name, got in zip(("o", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True):
        torch.testing.assert_close(got, truth[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sink_gradient(out, do[0], lse, sink), truth["dsinks"], rtol=1e-10, atol=1e-12)


def test_an_interface_that_is_not_known_is_refused_and_not_half_used():
    module = flash_attention_2()

    def _flash_attn_forward(q, k, v, scale, causal):
        raise AssertionError

    module._flash_attn_forward = _flash_attn_forward
    with pytest.raises(ImportError, match="interface is not known"):
        FlashAttention2(module).forward(*(t.detach() for t in draw()[:3]), FlashCall(1.0, True))


def test_without_flash_attention_the_error_names_the_extra(monkeypatch):
    install(monkeypatch)
    with pytest.raises(ImportError, match=r"flash_sink_attn\[flash\]"):
        flash_attn_with_sink_func(*draw()[:4])


def test_fa4_is_taken_when_it_is_the_only_one(monkeypatch, fa3):
    install(monkeypatch, fa3=fa3)
    cute = ModuleType("flash_attn.cute")
    seen = {}

    def flash_attn_func(q, k, v, **options):
        seen.update(options)
        return q, None

    cute.flash_attn_func = flash_attn_func
    package = ModuleType("flash_attn")
    package.__path__ = []
    without_backward = ModuleType("flash_attn_config")
    without_backward.CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_BACKWARD": True}}
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setitem(sys.modules, "flash_attn_config", without_backward)
    q, k, v, sink, _ = draw()
    assert flash_attn_with_sink_func(q, k, v, sink.reshape(1, 4), causal=True, window_size=(-1, 0)) is q
    assert seen["window_size"] == (None, 0) and seen["learnable_sink"].shape == (4,)
    for dtype, passed in ((torch.float64, torch.float32), (torch.float16, torch.float16)):
        flash_attn_with_sink_func(q, k, v, sink.to(dtype), causal=True)
        assert seen["learnable_sink"].dtype == passed
    seen.clear()
    with torch.no_grad():  # a FlashAttention-3 without a backward will do
        flash_attn_with_sink_func(q, k, v, sink, causal=True)
    assert not seen
    assert not FlashAttention3(fa3).has_backward


BAD = [
    (TypeError, "q: expected a tensor, got list", {"q": [1.0]}),
    (ValueError, r"q: expected 4 dimensions .* got shape \(3, 4, 8\)", {"q": torch.zeros(3, 4, 8).half()}),
    (TypeError, "q: expected float16 or bfloat16, got torch.float32", {"q": torch.zeros(2, 11, 4, 8)}),
    (TypeError, "k: expected q's dtype torch.bfloat16, got torch.float16", {"k": torch.zeros(2, 11, 2, 8).half()}),
    (ValueError, "v: expected a head dim", {"v": torch.zeros(2, 11, 2, 12).bfloat16()}),
    (ValueError, r"v: expected k's shape \(2, 11, 2, 8\), got", {"v": torch.zeros(2, 11, 2, 16).bfloat16()}),
    (ValueError, "v: expected k's leading dimensions", {"v": torch.zeros(2, 10, 2, 8).bfloat16()}),
    (ValueError, "q: expected a number of heads that is a multiple of k's 2, got 3",
     {"q": torch.zeros(2, 11, 3, 8).bfloat16()}),
    (TypeError, "sink: expected a tensor, got float", {"sink": 0.0}),
    (TypeError, "sink: expected a tensor, got NoneType", {"sink": None}),
    (ValueError, r"sink: expected 4 elements, .* got shape \(3,\)", {"sink": torch.zeros(3)}),
    (TypeError, "sink: expected a floating-point dtype, got torch.int32", {"sink": torch.zeros(4).int()}),
    (ValueError, "sink: expected q's device cpu, got meta", {"sink": torch.zeros(4, device="meta")}),
    (ValueError, "dropout_p: expected 0 <= dropout_p < 1, got 1.0", {"dropout_p": 1.0}),
    (ValueError, "dropout_p: expected 0 <= dropout_p < 1, got nan", {"dropout_p": float("nan")}),
    (TypeError, "dropout_p: expected a float, got None", {"dropout_p": None}),
    (TypeError, "softmax_scale: expected a float or None, got 'x'", {"softmax_scale": "x"}),
    (ValueError, "softmax_scale: expected a finite number above 0, got 0", {"softmax_scale": 0}),
    (TypeError, "causal: expected a bool, got 'no'", {"causal": "no"}),
    (TypeError, "deterministic: expected a bool, got None", {"deterministic": None}),
    (TypeError, "window_size: expected a pair of ints .* got None", {"window_size": None}),
    (TypeError, r"window_size: expected a pair of ints .* got \('a', 0\)", {"window_size": ("a", 0)}),
    (TypeError, r"window_size: expected a pair of ints .* got \(1.5, 0\)", {"window_size": (1.5, 0)}),
    (ValueError, r"window_size: expected \(left, right\), .* got \(-2, 0\)", {"window_size": (-2, 0)}),
    (ValueError, r"window_size: expected \(left, right\), .* got \(3,\)", {"window_size": (3,)}),
    (TypeError, "alibi_slopes: expected a tensor or None, got float", {"alibi_slopes": 0.5}),
    (TypeError, "alibi_slopes: expected float32, got torch.float16", {"alibi_slopes": torch.ones(4).half()}),
    (ValueError, r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(2,\)", {"alibi_slopes": torch.ones(2)}),
    (ValueError, "return_attn_probs: expected False, got True", {"return_attn_probs": True}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(monkeypatch, error, message, change):
    install(monkeypatch, fa2=flash_attention_2())
    arguments = dict(zip(("q", "k", "v", "sink"), draw(dtype=torch.bfloat16)[:4], strict=True))
    flash_attn_with_sink_func(**arguments)
    with pytest.raises(error, match=message):
        flash_attn_with_sink_func(**arguments | change)


@pytest.mark.parametrize("change", [{"dropout_p": 0.1}, {"alibi_slopes": torch.ones(4)}])
def test_what_flash_attention_3_lacks(monkeypatch, fa3, change):
    install(monkeypatch, fa3=fa3)
    with pytest.raises(ValueError, match="only flash_attn 2"):
        flash_attn_with_sink_func(*draw()[:4], **change)
