"""Replayed and captured calls on CUDA; what they launch, without a GPU, is in test_replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_sink_attn import calls, dispatch, flash_sink_attn_func, flash_sink_attn_varlen_func
from flash_sink_attn._mode import triton
from flash_sink_attn.hopper import support
from tests.fake_kernels import tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(varlen: bool, seed: int) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(seed)
    x = [t.cuda().requires_grad_() for t in tensors(batch=1 if varlen else 2, seqlen=300)]
    if varlen:
        cu = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
        x = [t.detach()[0].requires_grad_() if t.dim() == 4 else t for t in x]
        return lambda *given, **options: flash_sink_attn_varlen_func(*given, cu, 64, **options), x
    return lambda *given, **options: flash_sink_attn_func(*given, 64, **options), x


def impl_or_skip(impl: Any) -> None:
    if impl == "hopper" and (problem := support.device_problem(torch.device("cuda", 0))) is not None:
        pytest.skip(problem)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_replayed_on_cuda(varlen: bool, impl: Any) -> None:
    """Fresh tensors each time: what a replay computes is what a call in full computes."""
    impl_or_skip(impl)
    dispatch.forget()

    def results(seed: int) -> list[torch.Tensor]:
        function, x = on_cuda(varlen, seed)
        o = function(*x, impl=impl, deterministic=True)
        return [o, *torch.autograd.grad(o, x, torch.ones_like(o).mul_(0.5))]

    replayed = [results(seed) for seed in range(4)][-1]
    dispatch.forget()
    for a, b in zip(replayed, results(3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_captured_in_a_cuda_graph(varlen: bool, impl: Any) -> None:
    """Forward and backward in one graph, which then computes on what its inputs hold."""
    impl_or_skip(impl)
    dispatch.forget()
    function, x = on_cuda(varlen, 1)

    def run() -> list[torch.Tensor]:
        o = function(*x, impl=impl, deterministic=True)
        return [o, *torch.autograd.grad(o, x, torch.ones_like(o))]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for t in x:
            t.copy_(torch.randn_like(t))
    graph.replay()
    expected = run()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_the_short_way_is_taken_on_cuda() -> None:
    dispatch.forget()
    calls._calls.clear()  # those of other tests are out of date and lie there until they are asked for
    function, x = on_cuda(False, 1)
    for _ in range(2):
        function(*x)
    (call,) = calls._calls.values()
    assert call._forward is not None
    taken = [one.direct is not None for one in call._forward.steps]
    assert all(taken) if triton.__version__.startswith("3.6.") else True
