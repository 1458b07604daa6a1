"""The peers: what runs on a CPU against float64, the others' limits, reasons and loading."""

from __future__ import annotations

import importlib.util
import itertools
import math
import pkgutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import sweeps.baselines
from flash_sink_attn.reference import attention_reference, attention_reference_gradients
from sweeps.baselines import (
    cudnn,
    eager,
    fa2,
    fa3,
    fa4,
    flex,
    gptoss_triton,
    sdpa_cudnn,
    sdpa_flash,
    tilelang,
    upstream,
)
from sweeps.baselines.common import Peer, Unsupported, configured_path, load_file, visible_window
from sweeps.cases import Case
from sweeps.columns import OUTPUTS
from sweeps.implementation import Inputs
from sweeps.registry import load
from tests.test_flash_attn_with_sink import fa_backward, fa_forward, flash_attention_2, flash_attention_3, install

NAMES = sorted(m.name for m in pkgutil.iter_modules(sweeps.baselines.__path__) if m.name != "common")


def case_of(pass_: str = "fwd", **changes) -> Case:
    seqlens = changes.get("seqlens", ())
    fields = {"dtype": "bfloat16", "batch": len(seqlens) or 2, "seqlen_q": max(seqlens, default=40),
              "seqlen_k": max(seqlens, default=40), "heads_q": 4, "heads_kv": 2, "head_dim": 16, "head_dim_v": 16,
              "window": None, "varlen": "some" if seqlens else ""}
    return Case(pass_, **(fields | changes))


def inputs_of(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    """In float64, so that a peer's formulas and not its rounding are tested."""
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, heads: int, dim: int) -> torch.Tensor:
        shape = (sum(case.seqlens), heads, dim) if case.varlen else (case.batch, rows, heads, dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # exact in bfloat16, which is all FlashAttention-3 takes
    sinks = torch.tensor([-2.0, 0.5, 3.0, -math.inf]).float() if case.sinks else None
    cu = torch.tensor([0, *itertools.accumulate(case.seqlens)], dtype=torch.int32) if case.varlen else None
    return Inputs(
        q=draw(case.seqlen_q, case.heads_q, case.head_dim), k=draw(case.seqlen_k, case.heads_kv, case.head_dim),
        v=draw(case.seqlen_k, case.heads_kv, case.head_dim_v), sinks=sinks,
        do=draw(case.seqlen_q, case.heads_q, case.head_dim_v), cu_seqlens=cu,
        max_seqlen=case.seqlen_q, window=case.window, softmax_scale=case.head_dim ** -0.5)


def truth_of(inputs: Inputs) -> dict[str, torch.Tensor]:
    return attention_reference_gradients(inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.do, window=inputs.window,
                                         softmax_scale=inputs.softmax_scale, cu_seqlens_q=inputs.cu_seqlens)


def check(peer: Peer, case: Case, *, missing: tuple[str, ...] = (), rtol: float = 1e-7,
          dtype: torch.dtype = torch.float64):
    """Runs the peer twice and compares all the pass's outputs, layouts and all, with the truth."""
    assert peer.unsupported(case) is None
    inputs = inputs_of(case, dtype)
    prepared = peer.prepare(case, {}, inputs)
    if prepared.poison is None:
        assert prepared.outputs() == {}, "results of the preparation must not be left over"
    prepared.run()
    prepared.run()
    outputs, truth = prepared.outputs(), truth_of(inputs)
    expected = [n for n in OUTPUTS[case.pass_] if n not in missing and (n != "dsinks" or case.sinks)]
    assert list(outputs) == expected
    for name in expected:
        assert outputs[name].shape == truth[name].shape, name
        error = (outputs[name].double() - truth[name]).norm() / truth[name].norm()
        assert error <= rtol, (name, float(error))
    assert prepared.applies_sink
    return prepared


SHAPES = {
    "causal": {}, "window": {"window": 9}, "mha": {"heads_kv": 4}, "no sinks": {"sinks": False},
    "fewer queries": {"seqlen_q": 7, "window": 5}, "wide window": {"window": 40},
    "varlen": {"seqlens": (13, 0, 1, 26), "window": 6}, "unequal head dims": {"head_dim": 24},
}


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


# --- the cuDNN graphs, executed by a stand-in that reads and writes by the declared geometry alone ---

class _CudnnTensor:
    def __init__(self, uid=None, dim=None, stride=None, **_):
        self.uid, self.dim, self.stride, self.offsets = uid, dim, stride, None

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_output(self, _):
        return self

    set_data_type = set_output

    def set_ragged_offset(self, offsets):
        self.offsets = offsets

    def sequences(self, pack, lengths):
        """Views (heads, rows, last) of every sequence's part of the bound buffer."""
        data = pack[self.uid]
        flat = data.as_strided((data.untyped_storage().nbytes() // data.itemsize,), (1,), 0)
        for b in range(self.dim[0]):
            start = int(pack[self.offsets.uid].flatten()[b]) if self.offsets else b * self.stride[0]
            rows = int(lengths[b]) if self.offsets else self.dim[2]
            yield flat.as_strided((self.dim[1], rows, self.dim[3]), self.stride[1:], start) if rows else None


class _CudnnGraph:
    """Computes with the float64 reference what the nodes say."""

    def __init__(self, module):
        self.module, self.node = module, None

    def tensor(self, **fields):
        return _CudnnTensor(**fields)

    def sdpa(self, *, name, generate_stats, **node):
        assert generate_stats
        self.node = node | {"made": (_CudnnTensor(), _CudnnTensor())}
        return self.node["made"]

    def sdpa_backward(self, *, name, use_deterministic_algorithm, **node):
        self.node = node | {"made": (_CudnnTensor(), _CudnnTensor(), _CudnnTensor())}
        return self.node["made"]

    def validate(self):
        pass

    build_operation_graph = check_support = build_plans = validate

    def create_execution_plans(self, modes):
        assert modes == ["A", "FALLBACK"]

    def get_workspace_size(self):
        return 16

    def execute(self, pack, workspace, handle):
        node = self.node
        assert node["diagonal_band_right_bound"] == 0 and workspace.numel() >= 16 and handle == "handle"
        equal = node["q"].dim[2] == node["k"].dim[2]
        assert node["diagonal_alignment"] == ("TOP_LEFT" if equal else "BOTTOM_RIGHT")
        lengths = pack[node["seq_len_q"].uid].flatten() if "seq_len_q" in node else None
        assert (lengths is not None) == bool(node.get("use_padding_mask")) == bool(node["q"].offsets)
        sink = node.get("sink_token")
        sinks = pack[sink.uid].flatten() if sink else None
        names = [n for n in ("q", "k", "v", "dO", "o", "stats") if n in node]
        outputs = dict(zip(("dq", "dk", "dv") if "dO" in node else ("o", "lse"), node["made"], strict=True))
        parts = {n: list(t.sequences(pack, lengths)) for n, t in ({n: node[n] for n in names} | outputs).items()}
        dsinks = 0.0
        for b in range(node["q"].dim[0]):
            if parts["q"][b] is None:
                continue
            q, k, v = (parts[n][b].transpose(0, 1)[None] for n in ("q", "k", "v"))
            do = parts["dO"][b].transpose(0, 1)[None] if "dO" in parts else torch.zeros((*q.shape[:-1], v.shape[-1]))
            # a backward without sink_token is told of the sink by o and stats, so the stand-in knows it from the test
            truth = attention_reference_gradients(
                q, k, v, self.module.sinks if sinks is None and "dO" in node else sinks, do,
                window=node.get("diagonal_band_left_bound"), softmax_scale=node["attn_scale"])
            if "dO" in node:  # it must have been handed the forward's results
                torch.testing.assert_close(parts["o"][b].transpose(0, 1)[None], truth["o"].to(q.dtype))
                torch.testing.assert_close(parts["stats"][b][..., 0], truth["lse"][0].float())
                dsinks = dsinks + truth["dsinks"] if "dsinks" in truth else dsinks
            for name in outputs:
                made = truth[name][0][..., None] if name == "lse" else truth[name][0].transpose(0, 1)
                parts[name][b].copy_(made)
        if "dSink_token" in node:
            target = pack[node["dSink_token"].uid]
            added = self.module.sign * dsinks.reshape(target.shape)
            target.copy_(target + added if self.module.adds else added)


def cudnn_stand_in(version: int, *, sign: int = 1, adds: bool = False) -> SimpleNamespace:
    names = SimpleNamespace(HALF="h", BFLOAT16="b", FLOAT="f", INT32="i", INT64="l")
    module = SimpleNamespace(
        data_type=names, heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"), create_handle=lambda: "handle",
        diagonal_alignment=SimpleNamespace(TOP_LEFT="TOP_LEFT", BOTTOM_RIGHT="BOTTOM_RIGHT"),
        set_stream=lambda handle, stream: None, backend_version=lambda: version,
        backend_version_string=lambda: str(version), cudnnGraphNotSupportedError=KeyError, sign=sign, adds=adds)
    module.pygraph = lambda **_: _CudnnGraph(module)
    return module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pass_", ["fwd", "bwd", "fwd_bwd"])
@pytest.mark.parametrize("version", [91900, 92700])
def test_cudnn_graphs_describe_the_case(monkeypatch, version, pass_, shape):
    stand_in = cudnn_stand_in(version)
    monkeypatch.setitem(sys.modules, "cudnn", stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    case = case_of(pass_, **SHAPES[shape])
    stand_in.sinks = inputs_of(case).sinks
    prepared = check(cudnn.make({}), case, dtype=torch.bfloat16, rtol=4e-3)
    by_formula = version < 92600 and case.varlen and pass_ != "fwd"
    assert ("takes no sink_token" in prepared.note) == bool(by_formula)
    for _ in range(2):  # whatever was in the buffers before
        prepared.poison()
        assert all(t.isnan().all() for t in prepared.outputs().values())
        prepared.run()
        truth = truth_of(inputs_of(case, torch.bfloat16))
        for name, tensor in prepared.outputs().items():
            assert (tensor - truth[name]).norm() <= 4e-3 * truth[name].norm(), name


@pytest.mark.parametrize(("sign", "adds"), [(-1, False), (1, True), (-1, True)])
def test_cudnns_dsinks_are_learnt(monkeypatch, sign, adds):
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_stand_in(92700, sign=sign, adds=adds))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    prepared = check(cudnn.make({"deterministic": True}), case_of("bwd"), dtype=torch.bfloat16, rtol=4e-3)
    assert ("opposite sign" in prepared.note) == (sign < 0) and ("zeroed first" in prepared.note) == adds
    assert prepared.deterministic is None


def test_a_graph_cudnn_declines_is_unsupported(monkeypatch):
    stand_in = cudnn_stand_in(92700)

    class Declining(_CudnnGraph):
        def check_support(self):
            raise stand_in.cudnnGraphNotSupportedError("no engine")

    stand_in.pygraph = lambda **_: Declining(stand_in)
    monkeypatch.setitem(sys.modules, "cudnn", stand_in)
    with pytest.raises(Unsupported, match="no engine"):
        cudnn.make({}).prepare(case_of(), {}, inputs_of(case_of(), torch.bfloat16))


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


def test_an_old_cudnn_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 91002,
                                                              backend_version_string=lambda: "9.10.2"))
    assert "9.10.2 has no sinks" in cudnn.make({}).unavailable()


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


# --- peers loaded from a path ---

def upstream_copy(root: Path) -> Path:
    """A package laid out like upstream's, that computes in plain PyTorch with its block sizes in globals."""
    package = root / "flash_sink_attn"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise ImportError('needs flash_attn')\n")
    package.joinpath("sliding_cache.py").write_text(
        "class SlidingCacheManager:\n"
        "    def __init__(self, sliding_window=256):\n        self.sliding_window = sliding_window\n"
        "    def update(self, key, val):\n        self.key, self.val = key, val\n")
    package.joinpath("flash_sink_attn_gpt_oss.py").write_text(
        "from .sliding_cache import SlidingCacheManager\n"
        "from flash_sink_attn.reference import attention_reference\n"
        "BLOCK_M = BLOCK_N = 64\nSEEN = []\n"
        "class FlashSinkAttention:\n"
        "    @staticmethod\n    def apply(q, k, v, sink, manager, fp32):\n"
        "        assert manager.key is k and manager.val is v\n"
        "        SEEN.append((BLOCK_M, BLOCK_N, fp32))\n"
        "        return attention_reference(q, k, v, sink, window=manager.sliding_window)[0]\n")
    package.joinpath("flash_sink_varlen_attn_gpt_oss.py").write_text(
        "from flash_sink_attn.reference import attention_reference\n"
        "BLOCK_M = BLOCK_N = 64\n"
        "class FlashSinkVarlenAttention:\n"
        "    @staticmethod\n    def apply(q, k, v, sink, cu, manager, fp32):\n"
        "        return attention_reference(q, k, v, sink, window=manager.sliding_window, cu_seqlens_q=cu)[0]\n")
    return root


def test_upstream_is_loaded_under_another_name(tmp_path):
    import flash_sink_attn

    path = upstream_copy(tmp_path)
    for given in (path, path / "flash_sink_attn"):
        peer = upstream.make({"path": str(given)})
        peer.check_installed()  # without running its __init__
        check(peer, case_of("bwd", window=9), missing=("lse",))
    check(peer, case_of("fwd", seqlens=(13, 1, 26), window=6), missing=("lse",))
    assert sys.modules["flash_sink_attn"] is flash_sink_attn
    assert len(peer.versions()["upstream_source"]) == 12


def test_upstreams_blocks_are_its_globals(tmp_path):
    peer = upstream.make({"path": str(upstream_copy(tmp_path)), "disable_bf16_atomic_add": True})
    assert list(peer.space(case_of())) == [{"BLOCK_M": 64, "BLOCK_N": 64}, {"BLOCK_M": 128, "BLOCK_N": 128}]
    assert "equal blocks" in peer.rejected(case_of(), {"BLOCK_M": 64, "BLOCK_N": 128}, 90)
    assert "equal blocks" in peer.rejected(case_of(), {"BLOCK_M": 32, "BLOCK_N": 32}, 90)
    seen = peer.load("flash_sink_attn_gpt_oss").SEEN
    small, large = (peer.prepare(case_of(), {"BLOCK_M": b, "BLOCK_N": b}, inputs_of(case_of())) for b in (64, 128))
    del seen[:]
    small.run()
    large.run()
    small.run()
    assert seen == [(64, 64, True), (128, 128, True), (64, 64, True)]
    only = upstream.make({"path": "x", "block": 128})
    assert list(only.space(case_of())) == [{"BLOCK_M": 128, "BLOCK_N": 128}]
    with pytest.raises(ValueError, match="block"):
        upstream.make({"block": 96})


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        configured_path("upstream", {"path": str(tmp_path / "no")}, "a folder")
    with pytest.raises(FileNotFoundError, match="expected a folder with"):
        upstream.make({"path": str(tmp_path)}).check_installed()
    assert upstream.make({"path": str(tmp_path)}).versions() == {}


def test_a_file_may_import_what_is_not_installed(tmp_path):
    file = tmp_path / "attention.py"
    file.write_text("import not_installed\n\n"
                    "@not_installed.mark.parametrize('x', [1])\ndef f(x):\n    pass\n\nVALUE = 7\n")
    module = load_file("_peer_test_file", file, stand_ins={"not_installed": gptoss_triton._Anything("not_installed")})
    assert module.VALUE == 7 and load_file("_peer_test_file", file) is module
    assert "not_installed" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        load_file("_peer_test_other", file)
    assert "_peer_test_other" not in sys.modules


def test_tilelangs_example_gets_its_layout(tmp_path, monkeypatch):
    file = tmp_path / "example.py"
    file.write_text(
        "from flash_sink_attn.reference import attention_reference\n"
        "def attention(q, k, v, sinks, window, groups):\n"
        "    assert all(t.is_contiguous() or t.requires_grad for t in (q, k, v)) and sinks.dtype == q.dtype\n"
        "    assert q.shape[1] == groups * k.shape[1]\n"
        "    q, k, v = (t.transpose(1, 2) for t in (q, k, v))\n"
        "    return attention_reference(q, k, v, sinks, window=window)[0].transpose(1, 2)\n")
    peer = tilelang.make({"path": str(file)})
    for pass_ in ("fwd", "bwd"):
        prepared = check(peer, case_of(pass_, seqlen_q=96, seqlen_k=96, window=64, head_dim=32, head_dim_v=32),
                         missing=("lse",))
        assert "rounded to bfloat16" in prepared.note


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_gptoss_prepares_what_its_kernel_takes(tmp_path, monkeypatch):
    file = tmp_path / "attention.py"
    file.write_text("import pytest\n\nclass _Kernel:\n    calls = []\n    def __getitem__(self, grid):\n"
                    "        return lambda *a, **k: self.calls.append((grid, a, k))\n_attn_fwd = _Kernel()\n")
    peer = gptoss_triton.make({"path": str(file)})
    case = case_of("fwd", seqlen_q=100, seqlen_k=100, head_dim=64, head_dim_v=64, window=9)
    inputs = inputs_of(case, torch.bfloat16)
    prepared = peer.prepare(case, {}, inputs)
    (grid, arguments, options), = peer._load()._attn_fwd.calls
    assert grid == (2, 8, 1)
    q, k, v, sinks, scale, m, o, start_q, *sizes = arguments
    assert [list(t.shape) for t in (q, k, v, o)] == [[2, 4, 128, 64]] * 4 and list(m.shape) == [2, 4, 128]
    assert torch.equal(k.base[:, 3, :100], inputs.k[:, :, 1]) and k.base[:, :, 100:].abs().max() == 0
    assert sinks is inputs.sinks and scale == inputs.softmax_scale and int(start_q) == 0 and sizes == [2, 4]
    assert options == {"N_Q_CTX": 128, "N_KV_CTX": 100, "HEAD_DIM": 64, "BANDWIDTH": 9, "BLOCK_M": 64, "BLOCK_N": 64}
    prepared.poison()
    assert prepared.outputs()["o"].shape == (2, 100, 4, 64) and prepared.outputs()["o"].isnan().all()
