"""The peers: what runs on a CPU against float64, the others' limits and reasons."""

from __future__ import annotations

import itertools
import math
import pkgutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import sweeps.baselines
from flash_sink_attn.reference import attention_reference
from sweeps.baselines import eager, fa2, fa3, fa4, flex, gptoss_triton, sdpa_cudnn, sdpa_flash, tilelang
from sweeps.baselines.common import Unsupported, visible_window
from sweeps.columns import OUTPUTS
from sweeps.implementation import Inputs
from sweeps.registry import load
from tests.peer_cases import SHAPES, case_of, check, inputs_of, truth_of
from tests.test_flash_attn_with_sink import fa_backward, fa_forward, flash_attention_2, flash_attention_3, install

NAMES = sorted(m.name for m in pkgutil.iter_modules(sweeps.baselines.__path__) if m.name != "common")


# --- against float64 on the CPU ---

@pytest.mark.parametrize("shape", [*SHAPES, "more queries"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd_bwd"])
def test_eager(pass_, shape):
    changes = {"seqlen_q": 45} if shape == "more queries" else SHAPES[shape]
    prepared = check(eager.make({}), case_of(pass_, **changes), missing=("lse",), rtol=1e-6)
    assert prepared.deterministic is (True if pass_ == "fwd" else None)
    assert ("kept from one forward" in prepared.note) == (pass_ == "bwd")


@pytest.mark.parametrize("shape", ["causal", "mha", "no sinks", "wide window"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd_bwd"])
def test_a_sink_on_top_of_pytorchs_own_flash_kernel(pass_, shape):
    case = case_of(pass_, **SHAPES[shape])
    prepared = check(sdpa_flash.make({}), case, rtol=1e-6)
    assert ("sigmoid(lse - sink)" in prepared.note) == (pass_ != "bwd" and case.sinks)
    assert ("logaddexp(lse, sink)" in prepared.note) == (pass_ != "fwd" and case.sinks)


class _OnCuda(sdpa_flash.SdpaFlash):
    """Takes the way of CUDA wherever the tensors are."""

    def prepare(self, case, config, inputs):
        return self._on_cuda(case, inputs)


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize(("peer", "shapes"), [
    (_OnCuda({}), ["causal", "window", "no sinks", "fewer queries", "varlen"]),
    (sdpa_cudnn.make({}), ["causal", "no sinks"]),
])
def test_pytorchs_operators_take_what_they_are_given(peer, shapes):
    """Runs the real operators on tensors without data: names, number and types of their arguments."""
    for shape, pass_ in itertools.product(shapes, ("fwd", "bwd", "fwd_bwd")):
        case = case_of(pass_, **SHAPES[shape])
        assert peer.unsupported(case) is None
        inputs = inputs_of(case, torch.bfloat16)
        truth = {n: t for n, t in truth_of(inputs).items() if n in OUTPUTS[pass_]}
        moved = {n: t.to("meta") for n, t in vars(inputs).items() if isinstance(t, torch.Tensor)}
        prepared = peer.prepare(case, {}, Inputs(**(vars(inputs) | moved)))
        prepared.run()
        outputs = prepared.outputs()
        assert shapes_of(outputs) == shapes_of(truth)
        assert all(outputs[n].dtype == torch.bfloat16 for n in outputs if n not in ("lse", "dsinks"))


@pytest.mark.parametrize("shape", ["causal", "window", "no sinks", "fewer queries", "mha"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd_bwd"])
def test_sdpa_flash_asks_for_the_right_mask(monkeypatch, pass_, shape):
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
                window_size_left=-1, window_size_right=-1):
        assert (max_q, max_k, dropout_p) == (q.shape[1], k.shape[1], 0.0)
        out, lse, _ = fa_forward(q, k, v, 0.0, scale, is_causal, window_size_left, window_size_right, None)
        return out, lse, "seed", "offset", None

    def backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale,
                 window_size_left=-1, window_size_right=-1):
        assert (seed, offset) == ("seed", "offset")
        gradients = [torch.empty_like(t) for t in (q, k, v)]
        fa_backward(do, q, k, v, out, lse, *gradients, 0.0, scale, is_causal, window_size_left, window_size_right,
                    None, None)
        return gradients

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    check(_OnCuda({}), case_of(pass_, **SHAPES[shape]))


@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd_bwd"])
def test_sdpa_cudnn_gets_its_layout_and_its_lse_back(monkeypatch, pass_):
    def swap(*tensors):
        return [t.transpose(1, 2) for t in tensors]

    def forward(q, k, v, bias, compute_lse, dropout_p, is_causal, return_debug_mask, *, scale):
        assert bias is None and compute_lse is True and is_causal is True
        out, lse, _ = fa_forward(*swap(q, k, v), 0.0, scale, True, -1, -1, None)
        return *swap(out), lse[..., None], None, None, q.shape[2], k.shape[2], "seed", "offset", None

    def backward(do, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, *, scale):
        assert (seed, offset, bias, cu_q, cu_k) == ("seed", "offset", None, None, None)
        assert (max_q, max_k, dropout_p, is_causal) == (40, 40, 0.0, True) and lse.shape == (*q.shape[:3], 1)
        gradients = [torch.empty_like(t) for t in swap(q, k, v)]
        fa_backward(*swap(do, q, k, v, out), lse[..., 0], *gradients, 0.0, scale, True, -1, -1, None, None)
        return swap(*gradients)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward)
    check(sdpa_cudnn.make({}), case_of(pass_))


def test_pytorchs_flash_kernel_for_cpus_says_what_it_cannot():
    case = case_of(window=9)
    with pytest.raises(Unsupported, match="windows"):
        sdpa_flash.make({}).prepare(case, {}, inputs_of(case))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_forward(shape):
    check(flex.make({}), case_of("fwd", **SHAPES[shape]), dtype=torch.float32, rtol=1e-5)


def test_flex_has_no_backward_on_cpus():
    case = case_of("bwd")
    with pytest.raises(Unsupported, match="CPU"):
        flex.make({}).prepare(case, {}, inputs_of(case, torch.float32))


@pytest.mark.parametrize("shape", ["causal", "window", "varlen", "fewer queries"])
def test_flex_differentiates_through_its_lse(monkeypatch, shape):
    from torch.nn.attention import flex_attention as module

    def dense(q, k, v, *, block_mask, scale, enable_gqa, return_aux=None, return_lse=False):
        groups = q.shape[1] // k.shape[1]
        assert enable_gqa == (groups > 1)
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        s = (q @ k.repeat_interleave(groups, 1).mT) * scale
        s = s.masked_fill(~block_mask.mask_mod(0, 0, i, j), -math.inf)
        lse = torch.logsumexp(s, -1)
        out = torch.exp(s - lse[..., None]) @ v.repeat_interleave(groups, 1)
        return out, (lse if return_lse else SimpleNamespace(lse=lse))

    monkeypatch.setattr(module, "flex_attention", dense)
    check(flex.make({}), case_of("bwd", **SHAPES[shape]))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "unequal head dims"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd_bwd"])
def test_fa2_with_its_interface_re_enacted(monkeypatch, pass_, shape):
    install(monkeypatch, fa2=flash_attention_2())
    prepared = check(fa2.make({"deterministic": True}), case_of(pass_, **SHAPES[shape]))
    assert prepared.deterministic is True


@pytest.fixture(scope="module")
def flash3():
    return flash_attention_3()


def test_fa3_uses_its_own_sinks_where_they_are_exact(monkeypatch, flash3):
    install(monkeypatch, fa3=flash3)
    prepared = check(fa3.make({}), case_of("fwd", window=9), missing=("lse",))
    assert "sinks= in bfloat16" in prepared.note
    check(fa3.make({}), case_of("bwd", window=9))

    inputs = inputs_of(case_of("fwd"))
    inputs.sinks[0] = 0.1  # not a bfloat16
    prepared = fa3.make({}).prepare(case_of("fwd"), {}, inputs)
    prepared.run()
    torch.testing.assert_close(prepared.outputs()["o"], truth_of(inputs)["o"])
    torch.testing.assert_close(prepared.outputs()["lse"], truth_of(inputs)["lse"])
    assert "sigmoid(lse - sink)" in prepared.note and "bfloat16 only" in prepared.note


def test_fa3_believes_its_build_flags(monkeypatch):
    config = ModuleType("flash_attn_config")
    config.CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_BACKWARD": True, "FLASHATTENTION_DISABLE_VARLEN": True,
                                     "FLASHATTENTION_DISABLE_LOCAL": True, "FLASH_ATTENTION_DISABLE_HDIMDIFF192": True}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    peer = fa3.make({})
    assert peer.unsupported(case_of("fwd")) is None
    assert "no backward" in peer.unsupported(case_of("bwd"))
    assert "no varlen" in peer.unsupported(case_of(seqlens=(3, 4)))
    assert "no windows" in peer.unsupported(case_of(window=9))
    assert "unequal" in peer.unsupported(case_of(head_dim=24))
    monkeypatch.setitem(sys.modules, "flash_attn_config", None)
    assert peer.unsupported(case_of("bwd", window=9)) is None


@pytest.mark.parametrize("shape", ["causal", "window", "varlen", "no sinks"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_fa4_is_called_with_its_own_sinks(monkeypatch, pass_, shape):
    cute = ModuleType("flash_attn.cute")
    calls = []

    def answer(q, k, v, softmax_scale, window_size, learnable_sink, cu=None):
        left, right = window_size
        assert (left is None) == (right is None) and right in (None, 0)
        return attention_reference(q, k, v, learnable_sink, window=None if left is None else left + 1,
                                   softmax_scale=softmax_scale, cu_seqlens_q=cu)

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, learnable_sink, deterministic, return_lse):
        assert causal is True and return_lse is True
        calls.append(deterministic)
        return answer(q, k, v, softmax_scale, window_size, learnable_sink)

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
                               causal, window_size, learnable_sink, deterministic, return_lse):
        assert causal and cu_seqlens_k is cu_seqlens_q and max_seqlen_q == max_seqlen_k == 26
        calls.append(deterministic)
        return answer(q, k, v, softmax_scale, window_size, learnable_sink, cu_seqlens_q)

    cute.flash_attn_func, cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package = ModuleType("flash_attn")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    prepared = check(fa4.make({"deterministic": True}), case_of(pass_, **SHAPES[shape]))
    assert prepared.deterministic is True and set(calls) == {True}
    # of a backward only the forward before it and what autograd does
    assert len(calls) == (1 if pass_ == "bwd" else 3)


# --- limits, absence, options ---

@pytest.mark.parametrize("name", NAMES)
def test_every_peer_is_an_implementation_of_its_own_name(name):
    peer = load(name)
    assert peer.name == name
    assert peer.is_flash == (name in {"sdpa_flash", "sdpa_cudnn", "fa2", "fa3", "fa4", "cudnn"})
    for part in ("bwd_dq", "bwd_dkdv"):
        assert "our own kernels only" in peer.unsupported(case_of(part))
    assert peer.compile(case_of(), {}, 90) == {}
    assert peer.rejected(case_of(), {"num_warps": 4}, 90)
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in peer.versions().items())
    configurations = list(peer.space(case_of()))
    assert configurations and all(peer.rejected(case_of(), c, 90) is None for c in configurations)
    with pytest.raises(ValueError, match="option 'pth' is unknown"):
        load(name, {"pth": "x"})


@pytest.mark.parametrize("name", NAMES)
def test_absent_peers_give_a_reason(name):
    if torch.cuda.is_available():
        pytest.skip("for machines without CUDA")
    reason = load(name).unavailable()
    if name in ("eager", "flex", "sdpa_flash"):
        assert reason is None
    else:
        assert reason == f"{name} needs a CUDA device, this machine has none"


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4", "cudnn", "tilelang", "gptoss_triton", "upstream"])
def test_a_package_that_is_missing_or_broken_is_a_reason_and_no_crash(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    install(monkeypatch)
    for module in ("cudnn", "tilelang"):
        monkeypatch.setitem(sys.modules, module, None)
    peer = load(name)
    reason = peer.unavailable()
    assert reason and ("no `path:` configured" in reason if name in ("gptoss_triton", "upstream")
                       else reason.startswith("ModuleNotFoundError"))

    def broken() -> None:
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(peer, "check_installed", broken)
    assert peer.unavailable() == "OSError: undefined symbol: _ZN3c10"


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("sdpa_cudnn", {"window": 9}, "window 9"), ("sdpa_cudnn", {"seqlens": (3, 4)}, "varlen"),
    ("sdpa_cudnn", {"seqlen_q": 7}, "fewer queries"), ("sdpa_cudnn", {"head_dim": 192, "head_dim_v": 192}, "above 128"),
    ("sdpa_flash", {"head_dim": 24}, "value head dim"), ("fa2", {"seqlen_q": 41}, "without a visible key"),
    ("fa4", {"seqlen_q": 41}, "without a visible key"), ("fa4", {"head_dim": 264, "head_dim_v": 264}, "above 256"),
    ("flex", {"head_dim": 8, "head_dim_v": 8}, "below 16"), ("gptoss_triton", {}, "64, 128 and 256"),
    ("gptoss_triton", {"head_dim": 64, "head_dim_v": 64, "sinks": False}, "without sinks"),
    ("gptoss_triton", {"head_dim": 64, "head_dim_v": 64, "seqlens": (3, 4)}, "varlen"),
    ("gptoss_triton", {"head_dim": 64, "head_dim_v": 64, "seqlen_q": 7}, "fewer queries"),
    ("upstream", {"head_dim": 24, "head_dim_v": 24}, "powers of two"), ("upstream", {"sinks": False}, "without sinks"),
    ("upstream", {"seqlen_q": 7}, "fewer queries"), ("upstream", {"head_dim": 256, "head_dim_v": 256}, "above 128"),
    ("tilelang", {"window": 9, "head_dim": 64, "head_dim_v": 64}, "multiples of 64"),
    ("tilelang", {}, "multiples of 32"), ("cudnn", {"seqlen_q": 1}, "one query"),
])
def test_limits(name, changes, words):
    assert words in load(name).unsupported(case_of(**changes))


def test_forward_only_peers_say_so():
    assert "no pass 'bwd'" in gptoss_triton.make({}).unsupported(case_of("bwd", head_dim=64, head_dim_v=64))


def test_a_window_that_hides_nothing_is_none():
    assert visible_window(case_of(window=40)) is None and visible_window(case_of(window=39)) == 39
    assert sdpa_flash.make({}).unsupported(case_of(window=40)) is None
    assert load("sdpa_cudnn").unsupported(case_of(window=40)) is None


def test_options_but_not_paths_belong_to_the_versions():
    assert fa2.make({"deterministic": True}).versions()["option_deterministic"] == "True"
    assert "option_path" not in tilelang.make({"path": "x"}).versions()
