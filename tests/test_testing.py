"""The error rule lets right results through and stops wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from flash_sink_attn.reference import attention_reference
from flash_sink_attn.testing import (
    LSE_ROUNDING,
    AttentionInputs,
    check,
    error_budget,
    expected,
    make_inputs,
    relative_error,
    truth_and_eager,
    unit_roundoff,
    worst_row_error,
)

Results = dict[str, torch.Tensor]
OUTPUTS = ("o", "lse", "dq", "dk", "dv", "dsinks")
HALVES = [torch.bfloat16, torch.float16]


def example(
    dtype: torch.dtype = torch.bfloat16, seqlen: int = 96, window: int | None = None, **change: object
) -> tuple[AttentionInputs, Results, Results]:
    shape = {"batch": 2, "heads_q": 4, "heads_kv": 2, "head_dim": 32, "seqlen_q": seqlen}
    x = make_inputs(**(shape | change), dtype=dtype)  # type: ignore[arg-type]
    return x, *truth_and_eager(x, window=window)


def kernel_like(x: AttentionInputs, window: int | None = None) -> Results:
    """float32 arithmetic, half storage of o, p and ds, delta from the stored o: what a fused kernel does."""
    assert x.cu_seqlens_q is None
    q, k, v, do = (t.float().transpose(1, 2) for t in (x.q, x.k, x.v, x.do))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    _, lse = attention_reference(x.q, x.k, x.v, x.sinks, window=window, dtype=torch.float32)
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    distance = i - torch.arange(k.shape[2])
    visible = (distance >= 0) & (distance < (window or k.shape[2] + 1))
    scale = q.shape[-1] ** -0.5
    scores = torch.where(visible, q @ k.mT * scale, -math.inf)
    p = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    sinks = torch.full((q.shape[1],), -math.inf) if x.sinks is None else x.sinks
    peak = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1).amax(-1, keepdim=True)
    numerator = torch.exp(scores - peak).nan_to_num(0.0).to(x.q.dtype).float() @ v
    o = (numerator * torch.exp(peak - lse[..., None]).nan_to_num(0.0)).to(x.q.dtype)
    delta = (o.float() * do).sum(-1)
    ds = (p * (do @ v.mT - delta[..., None])).to(x.q.dtype).float()
    p = p.to(x.q.dtype).float()
    dq = ds @ k * scale
    dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (ds.mT @ q * scale, p.mT @ do))
    halves = {"o": o, "dq": dq, "dk": dk, "dv": dv}
    results = {"lse": lse} | {n: t.transpose(1, 2).to(x.q.dtype) for n, t in halves.items()}
    if x.sinks is not None:
        share = torch.exp(x.sinks[None, :, None] - lse).nan_to_num(0.0)
        results["dsinks"] = -(share * delta).sum((0, 2))
    return results


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("seqlen", "window", "change"), [
    (96, None, {}), (96, 7, {}), (96, 1, {}), (1, None, {}), (2, None, {"heads_q": 1, "heads_kv": 1, "batch": 1}),
    (33, 5, {"seqlen_k": 70}), (96, None, {"sinks": False}), (40, 1, {"sinks": False}), (64, None, {"sink_scale": 8.0}),
], ids=str)
def test_right_results_pass(dtype: torch.dtype, seqlen: int, window: int | None, change: dict[str, object]) -> None:
    x, truth, eager = example(dtype, seqlen, window, **change)
    names = OUTPUTS if x.sinks is not None else OUTPUTS[:-1]
    rounded = {n: truth[n].float() if n in ("lse", "dsinks") else truth[n].to(dtype) for n in names}
    for results in (eager, rounded, kernel_like(x, window)):
        outcomes = check({n: results[n] for n in names}, truth, eager, dtype)
        assert all(o.ok for o in outcomes.values()), [o.message for o in outcomes.values()]
        assert all(o.error <= o.allowed < 0.1 for o in outcomes.values())


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Results], Results]:
    def apply(results: Results) -> Results:
        x = results[name].clone()
        changed = change(x)
        return results | {name: x if changed is None else changed}

    return apply


def scale_row(factor: float) -> Callable[[torch.Tensor], None]:
    def change(x: torch.Tensor) -> None:
        x[1, 90, 0] *= factor

    return change


def put(at: tuple[int, ...], value: float) -> Callable[[torch.Tensor], None]:
    def change(x: torch.Tensor) -> None:
        x[at] = value

    return change


FAULTS: dict[str, tuple[str, Callable[[Results], Results]]] = {
    "a row of o zero": ("o", edit("o", scale_row(0.0))),
    "a row of dq scaled": ("dq", edit("dq", scale_row(1.25))),
    "a row of dk zero": ("dk", edit("dk", scale_row(0.0))),
    "a row of dv scaled": ("dv", edit("dv", scale_row(1.25))),
    "one NaN": ("o", edit("o", put((0, 5, 1, 3), math.nan))),
    "one infinity": ("dv", edit("dv", put((0, 5, 1, 3), math.inf))),
    "a lse of minus infinity": ("lse", edit("lse", put((0, 1, 5), -math.inf))),
    "everything 3% off": ("dk", edit("dk", lambda x: x + 0.03 * torch.randn_like(x) * x)),
    "swapped heads": ("o", edit("o", lambda x: x[:, :, [1, 0, 2, 3]])),
    "lse in base 2": ("lse", edit("lse", lambda x: x / math.log(2))),
    "lse off by 1%": ("lse", edit("lse", lambda x: x * 1.01)),
    "one lse off": ("lse", edit("lse", put((0, 1, 5), 9.0))),
    "dsinks of the other sign": ("dsinks", edit("dsinks", lambda x: -x)),
    "dsinks without a batch": ("dsinks", edit("dsinks", lambda x: x / 2)),
    "a head's dsinks lost": ("dsinks", edit("dsinks", put((2,), 0.0))),
    "a wrong shape": ("o", edit("o", lambda x: x[:, :-1])),
}


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_and_is_named(fault: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, truth, eager = example(dtype)
    name, plant = FAULTS[fault]
    outcomes = check(plant(kernel_like(x)), truth, eager, dtype)
    assert [n for n in OUTPUTS if not outcomes[n].ok] == [name]
    assert outcomes[name].message.startswith(f"{name}: ")
    if fault.startswith("a row"):
        assert "index (1, 90, 0)" in outcomes[name].message


@pytest.mark.parametrize(("results_window", "sinks_change"), [(8, 0.0), (6, 0.0), (7, -math.inf), (7, 0.3)],
                         ids=["window + 1", "window - 1", "no sink", "sink off by 0.3"])
def test_the_wrong_mask_or_sink_fails_everywhere(results_window: int, sinks_change: float) -> None:
    x, truth, eager = example(window=7)
    assert x.sinks is not None
    x.sinks.add_(sinks_change)
    outcomes = check(kernel_like(x, results_window), truth, eager, torch.bfloat16)
    assert not any(outcomes[n].ok for n in ("o", "lse", "dq", "dk", "dv", "dsinks"))


def test_rows_without_keys_must_be_exactly_zero() -> None:
    _, truth, eager = example(seqlen_k=90)
    right = {n: truth[n].to(torch.bfloat16) for n in ("o", "dq")} | {"lse": truth["lse"].float()}
    assert all(o.ok for o in check(right, truth, eager, torch.bfloat16).values())
    for name in ("o", "dq"):
        wrong = right[name].clone()
        wrong[0, 3, 1, 0] = 1e-20
        outcome = check({name: wrong}, truth, eager, torch.bfloat16)[name]
        assert not outcome.ok and "index (0, 3, 1)" in outcome.message
    _, truth, eager = example(seqlen_k=90, sinks=False)
    lse = truth["lse"].float()
    assert (lse[..., :6] == -math.inf).all() and check({"lse": lse}, truth, eager, torch.bfloat16)["lse"].ok
    assert not check({"lse": lse.clamp_min(-1e30)}, truth, eager, torch.bfloat16)["lse"].ok


def test_nothing_at_all_is_visible() -> None:
    _, truth, eager = example(seqlen=3, seqlen_k=0)
    right = {n: truth[n].to(torch.bfloat16) for n in ("o", "dq", "dk", "dv")} | {"dsinks": truth["dsinks"].float()}
    outcomes = check(right, truth, eager, torch.bfloat16)
    assert all(o.ok and o.error == 0 for o in outcomes.values())
    assert not check({"dq": right["dq"] + 1e-6}, truth, eager, torch.bfloat16)["dq"].ok
    assert not check({"dsinks": right["dsinks"] + 1e-6}, truth, eager, torch.bfloat16)["dsinks"].ok


def test_a_budget_is_twice_eager_and_one_rounding() -> None:
    truth = {"o": torch.tensor([[[[3.0, 4.0]], [[0.0, 10.0]]]], dtype=torch.float64)}
    eager = {"o": truth["o"] + torch.tensor([[[[0.0, 0.0]], [[0.0, 0.1]]]])}
    budget = error_budget(expected("o", truth, eager), torch.bfloat16)
    assert budget.rel == pytest.approx(2 * 0.1 / math.sqrt(125) + 2**-8)
    assert budget.row == pytest.approx(10 * 0.01 + 2**-8)
    assert unit_roundoff(torch.bfloat16) == 2**-8 and unit_roundoff(torch.float16) == 2**-11
    lse = {"lse": torch.tensor([[[8.0, 0.5]]], dtype=torch.float64)}
    budget = error_budget(expected("lse", lse, lse), torch.bfloat16)
    assert budget.rel == pytest.approx(LSE_ROUNDING * math.hypot(8, 1) / math.hypot(8, 0.5))
    assert budget.row == pytest.approx(LSE_ROUNDING)


def test_dsinks_of_one_head_is_not_held_to_eagers_luck() -> None:
    """Eager's sum may be right by accident; its terms show by how much it could have been off."""
    rows = torch.tensor([[[1.0, -1.0, 2.0]]], dtype=torch.float64)
    truth = {"dsinks": torch.tensor([2.0], dtype=torch.float64), "dsinks_rows": rows, "dsinks_rows_scale": rows.abs()}
    eager = {"dsinks": torch.tensor([2.0]), "dsinks_rows": rows + torch.tensor([0.03, -0.04, 0.01])}
    part = expected("dsinks", truth, eager)
    assert part.eager_distance.tolist() == pytest.approx([math.sqrt(0.0026)])
    assert part.row_size.tolist() == pytest.approx([math.sqrt(6)])
    assert error_budget(part, torch.bfloat16).rel == pytest.approx((2 * math.sqrt(0.0026) + 2**-8 * math.sqrt(6)) / 2)


def test_an_eager_that_overflows_gives_no_slack() -> None:
    _, truth, eager = example(torch.float16)
    for name, right in (("o", truth["o"].half()), ("dsinks", truth["dsinks"].float())):
        broken = {n: torch.full_like(t, math.inf) if n.startswith(name) else t for n, t in eager.items()}
        outcome = check({name: right}, truth, broken, torch.float16)[name]
        assert outcome.ok and outcome.allowed < 2**-9
        assert not check({name: 1.01 * right}, truth, broken, torch.float16)[name].ok


def test_error_measures() -> None:
    truth = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], dtype=torch.float64)
    x = truth + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0]])
    assert relative_error(x, truth) == pytest.approx(0.5 / math.sqrt(125))
    assert worst_row_error(x, truth) == pytest.approx(0.1)
    assert relative_error(truth * 0, truth * 0) == worst_row_error(truth * 0, truth * 0) == 0.0
    x[1, 0] = 1e-30
    assert worst_row_error(x, truth) == math.inf
    x[1, 0] = math.nan
    assert relative_error(x, truth) == worst_row_error(x, truth) == math.inf
    infinite = torch.tensor([-math.inf, 1.0], dtype=torch.float64)
    assert relative_error(infinite.float(), infinite) == 0.0
    assert relative_error(torch.tensor([0.0, 1.0]), infinite) == math.inf


def test_inputs() -> None:
    x = make_inputs(batch=2, seqlen_q=5, seqlen_k=7, heads_q=6, heads_kv=3, head_dim=8, head_dim_v=16,
                    dtype=torch.float16, seed=3, sink_scale=5.0)
    assert [tuple(t.shape) for t in (x.q, x.k, x.v, x.do)] == [(2, 5, 6, 8), (2, 7, 3, 8), (2, 7, 3, 16), (2, 5, 6, 16)]
    assert {t.dtype for t in (x.q, x.k, x.v, x.do)} == {torch.float16}
    assert x.sinks is not None and x.sinks.dtype == torch.float32 and 2 < x.sinks.std() < 9
    again = make_inputs(batch=2, seqlen_q=5, seqlen_k=7, heads_q=6, heads_kv=3, head_dim=8, head_dim_v=16,
                        dtype=torch.float16, seed=3)
    assert torch.equal(again.q, x.q) and torch.equal(again.do, x.do)
    packed = make_inputs(seqlens=(3, 0, 4), seqlens_k=(3, 2, 1), heads_q=2, heads_kv=1, head_dim=8,
                         dtype=torch.bfloat16, sinks=False)
    assert packed.q.shape == (7, 2, 8) and packed.k.shape == (6, 1, 8) and packed.sinks is None
    assert packed.cu_seqlens_q is not None and packed.cu_seqlens_k is not None
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()) == ([0, 3, 3, 7], [0, 3, 5, 6])
    assert (packed.max_seqlen_q, packed.max_seqlen_k) == (4, 3)
    with pytest.raises(ValueError, match="seqlens_k: expected 2 lengths"):
        make_inputs(seqlens=(3, 4), seqlens_k=(3,), heads_q=2, heads_kv=1, head_dim=8, dtype=torch.bfloat16)
