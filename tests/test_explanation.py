"""explain() says of a call what the call does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sink_attn import TileConfig, dispatch, explain, flash_sink_attn_func, flash_sink_attn_varlen_func
from flash_sink_attn.config import KERNELS
from flash_sink_attn.dispatch import DeviceInfo
from flash_sink_attn.sliding_cache import SlidingCacheManager
from flash_sink_attn.tuned_table import ENV_VAR, Entry, ShapeKey, TunedTable

TUNED, ASKED = TileConfig(16, 16, 1, 1), TileConfig(32, 16, 1, 1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors(*shape: int, heads_kv: int = 1, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    q = torch.randn(*shape, 2, 16, dtype=dtype, device=DEVICE)
    k, v = (torch.randn(*shape, heads_kv, 16, dtype=dtype, device=DEVICE) for _ in range(2))
    return q, k, v


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    key = ShapeKey.fixed("float16", 16, 16, 2, 1, 8, 1, 40, 40)
    entries = [Entry("fwd", key, TUNED, 0.1, "fwd", 0.2, "the-case", "the-run")]
    path = tmp_path / "mine.json"
    TunedTable.build("h100", entries, {"the-run": {"triton": "1.0"}}, arch=90).save(path)
    monkeypatch.setenv(ENV_VAR, str(path))
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("h100", 90))
    dispatch.forget()
    yield path
    dispatch.forget()


def test_every_rung_in_words(table: Path) -> None:
    q, k, v = tensors(1, 40)
    found = explain(q, k, v, None, 8)
    assert [d.kernel for d in found] == ["fwd", "bwd_dq", "bwd_dkdv"]
    assert found["fwd"].config == TUNED and found["fwd"].entry.case == "the-case" and found["fwd"].distance == 0
    text = str(found)
    assert "fwd: exact: 16x16 num_warps=1" in text and "the-case, 0.1 ms as fwd, the heuristic 0.2 ms" in text
    assert "run the-run of" in text and str(table) in text and "Triton 1.0 (here" in text
    assert "bwd_dq: heuristic:" in text and "no usable entry of this kernel" in text
    assert explain(q, k, window=9)["fwd"].source == "nearest"
    assert explain(q, k, v, None, 8, config=ASKED)["bwd_dq"][1:3] == (ASKED, "explicit")
    assert explain(q, k, window=8, config={"bwd_dq": ASKED.to_dict()})["fwd"].source == "exact"
    assert [d.kernel for d in explain(q, k, pass_="bwd")] == ["bwd_dq", "bwd_dkdv"]


CALLS: dict[str, tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "fixed": ((1, 40), (None, 8), {}),
    "a window that hides nothing": ((1, 40), (None, 40), {}),
    "batch": ((2, 24), (None,), {"window": 5}),
    "varlen": ((40,), (None, torch.tensor([0, 10, 40], dtype=torch.int32, device=DEVICE), 8), {}),
    "varlen with the longest": ((40,), (None, torch.tensor([0, 10, 40], dtype=torch.int32, device=DEVICE)),
                                {"window": 8, "max_seqlen_q": 30, "max_seqlen_k": 30}),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_looks_up_what_the_call_looks_up(table: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, rest, named = CALLS[name]
    q, k, v = (x.requires_grad_() for x in tensors(*shape))
    asked: dict[str, Any] = {}

    def explain_kernel(kernel: Any, key: ShapeKey, *rest: Any) -> dispatch.Decision:
        asked[kernel] = key
        return ask(kernel, key, *rest)

    ask = dispatch.explain_kernel
    monkeypatch.setattr(dispatch, "explain_kernel", explain_kernel)
    function = flash_sink_attn_varlen_func if len(shape) == 1 else flash_sink_attn_func
    function(q, k, v, *rest, **named).sum().backward()
    by_the_call = dict(asked)
    asked.clear()
    explain(q, k, v, *rest, **named)
    assert set(asked) == set(KERNELS) and asked == by_the_call


def test_a_cache_managers_keys_are_the_ones(table: Path) -> None:
    q, k, v = tensors(1, 40)
    cache = SlidingCacheManager(8)
    cache.update(k, v)
    assert explain(q, k[:, :1], v[:, :1], None, cache)["fwd"].source == "exact"


def test_wrong_arguments_are_the_calls_errors() -> None:
    q, k, v = tensors(1, 40)
    with pytest.raises(ValueError, match=r"pass_: expected one of .* got 'forward'"):
        explain(q, k, pass_="forward")
    with pytest.raises(ValueError, match="window"):
        explain(q, k, v, None, 0)
    with pytest.raises(TypeError, match="cu_seqlens"):
        explain(q[0], k[0])
    with pytest.raises(KeyError, match="bwd_dq"):
        explain(q, k, pass_="fwd")["bwd_dq"]
