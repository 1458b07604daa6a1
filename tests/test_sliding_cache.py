from __future__ import annotations

import numpy
import pytest
import torch

from flash_sink_attn import SinkCacheManager, SlidingCacheManager, flash_sink_attn_func, flash_sink_attn_varlen_func

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, torch.bfloat16)


def test_both_names_are_one_class_with_upstreams_default_window():
    assert SinkCacheManager is SlidingCacheManager
    assert SlidingCacheManager().sliding_window == 256
    assert SlidingCacheManager(None).sliding_window is None
    assert SlidingCacheManager(numpy.int64(7)).sliding_window == 7
    assert type(SlidingCacheManager(numpy.int64(7)).sliding_window) is int


def test_update_replaces_and_reset_forgets():
    manager = SlidingCacheManager(4)
    assert (manager.key, manager.val, manager.num_kv) == (None, None, 0)
    for seqlen in (5, 3):
        key, val = torch.randn(2, seqlen, 1, 16), torch.randn(2, seqlen, 1, 8)
        manager.update(key, val)
        assert manager.key is key and manager.val is val and manager.num_kv == seqlen
    manager.update(torch.randn(11, 2, 16), torch.randn(11, 2, 16))
    assert manager.num_kv == 11
    manager.reset()
    assert (manager.key, manager.val, manager.num_kv, manager.sliding_window) == (None, None, 0, 4)


@pytest.mark.parametrize(("window", "error", "message"), [
    (0, ValueError, "sliding_window: expected an integer >= 1 or None, got 0"),
    (-1, ValueError, "sliding_window: expected an integer >= 1 or None, got -1"),
    (2.0, TypeError, "sliding_window: expected an integer >= 1 or None, got float"),
    (True, TypeError, "sliding_window: expected an integer >= 1 or None, got a bool"),
    ("8", TypeError, "sliding_window: expected an integer >= 1 or None, got str"),
])
def test_a_bad_window_is_refused(window, error, message):
    with pytest.raises(error, match=message):
        SlidingCacheManager(window)


@pytest.mark.parametrize(("key", "val", "error", "message"), [
    (None, torch.zeros(1, 2, 1, 8), TypeError, "key: expected a torch.Tensor, got NoneType"),
    (torch.zeros(2, 8), torch.zeros(2, 8), ValueError, r"key: expected .* got shape \(2, 8\)"),
    (torch.zeros(1, 2, 1, 8), torch.zeros(1, 3, 1, 8), ValueError, r"val: expected key's shape .* got \(1, 3, 1, 8\)"),
    (torch.zeros(1, 2, 1, 8), torch.zeros(2, 1, 8), ValueError, r"val: expected key's shape .* got \(2, 1, 8\)"),
    (torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8).half(), TypeError, "val: expected key's dtype torch.float32"),
    (torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8, device="meta"), ValueError, "val: expected key's device cpu"),
])
def test_a_bad_update_is_refused_and_changes_nothing(key, val, error, message):
    manager = SlidingCacheManager(8)
    held = torch.zeros(1, 1, 1, 8)
    manager.update(held, held)
    with pytest.raises(error, match=message):
        manager.update(key, val)
    assert manager.key is held and manager.val is held and manager.num_kv == 1


@pytest.mark.parametrize("window", [3, None])
def test_upstreams_call_uses_the_managers_keys_values_and_window(window):
    q, k, v = random(1, 9, 2, 16, seed=0), random(1, 9, 1, 16, seed=1), random(1, 9, 1, 16, seed=2)
    sinks = random(2, seed=3)
    manager = SlidingCacheManager(window)
    manager.update(k, v)
    ignored = torch.full_like(k, float("nan"))
    expected = flash_sink_attn_func(q, k, v, sinks, window)
    assert torch.equal(flash_sink_attn_func(q, ignored, ignored, sinks, manager, False), expected)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    manager.update(k[0], v[0])
    expected = flash_sink_attn_varlen_func(q[0], k[0], v[0], sinks, cu_seqlens, window)
    actual = flash_sink_attn_varlen_func(q[0], ignored[0], ignored[0], sinks, cu_seqlens, manager, False)
    assert torch.equal(actual, expected)


def test_gradients_reach_the_managers_keys_and_values():
    q = random(1, 5, 1, 16, seed=0)
    k, v = random(1, 5, 1, 16, seed=1).requires_grad_(), random(1, 5, 1, 16, seed=2).requires_grad_()
    manager = SlidingCacheManager(2)
    manager.update(k, v)
    flash_sink_attn_func(q, k, v, None, manager).sum().backward()
    # The values' gradients are sums of probabilities: without sinks those of the five rows make five in all.
    assert v.grad[..., 0].sum().item() == pytest.approx(5.0, rel=2**-7)
    assert k.grad.abs().sum() > 0
