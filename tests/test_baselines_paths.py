"""Peers that are loaded from a path: upstream, tilelang's example, OpenAI's kernel."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from sweeps.baselines import gptoss_triton, tilelang, upstream
from sweeps.baselines.common import configured_path, load_file
from tests.peer_cases import case_of, check, inputs_of


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
