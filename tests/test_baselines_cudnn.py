"""The cuDNN peer, its graphs executed by a stand-in that reads and writes by the declared geometry alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from flash_sink_attn.reference import attention_reference_gradients
from sweeps.baselines import cudnn
from sweeps.baselines.common import Unsupported
from tests.peer_cases import SHAPES, case_of, check, inputs_of, truth_of


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


def test_an_old_cudnn_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 91002,
                                                              backend_version_string=lambda: "9.10.2"))
    assert "9.10.2 has no sinks" in cudnn.make({}).unavailable()
