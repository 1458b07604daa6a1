"""The gate lets right results through, stops each planted fault, and says where it is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch

from flash_sink_attn.reference import attention_reference_gradients, eager_gradients
from flash_sink_attn.testing import relative_error
from sweeps.cases import Case
from sweeps.columns import OUTPUTS
from sweeps.gate import Oracle, Sample, Verdict, gate_inputs
from sweeps.implementation import Inputs

Results = dict[str, torch.Tensor]
ALL = OUTPUTS["fwd_bwd"]
# Nothing, or only the first and the last unit, or of those only some rows and keys.
SAMPLES = {"all": Sample(), "ends": Sample(cells=500_000), "positions": Sample(cells=1000, rows=64)}

CASES = {
    "causal": Case("bwd", "bfloat16", 2, 300, 300, 8, 2, 32, 32),
    "window": Case("bwd", "bfloat16", 1, 300, 300, 8, 2, 32, 16, window=40),
    "fp16": Case("bwd", "float16", 1, 300, 300, 6, 3, 32, 32),
    "mqa": Case("bwd", "bfloat16", 2, 200, 200, 4, 1, 16, 16),
    "fewer queries": Case("bwd", "float16", 2, 60, 300, 4, 2, 16, 16, window=100),
    "more queries": Case("bwd", "bfloat16", 1, 300, 120, 4, 2, 16, 16),
    "varlen": Case("bwd", "bfloat16", 4, 200, 200, 4, 2, 16, 16, varlen="mix", seqlens=(200, 0, 1, 131)),
    "no sinks": Case("bwd", "bfloat16", 1, 300, 300, 4, 2, 16, 16, sinks=False),
    "one token": Case("bwd", "bfloat16", 1, 1, 1, 2, 1, 16, 16),
}


def gradients(of: Callable[..., Results], x: Inputs, window: int | None) -> Results:
    return of(x.q, x.k, x.v, x.sinks, x.do, window=window, softmax_scale=x.softmax_scale, cu_seqlens_q=x.cu_seqlens)


def right(x: Inputs, window: int | None) -> Results:
    """The truth, rounded once to the dtype of each output."""
    truth = gradients(attention_reference_gradients, x, window)
    return {n: truth[n].float() if n in ("lse", "dsinks") else truth[n].to(x.q.dtype) for n in ALL if n in truth}


@functools.cache
def prepared(name: str) -> tuple[Case, Inputs, Results]:
    case = CASES[name]
    x = gate_inputs(case, "cpu")
    return case, x, right(x, case.window)


@functools.cache
def oracle(name: str, sample: str) -> Oracle:
    case, x, _ = prepared(name)
    return Oracle(case, x, sample=SAMPLES[sample])


def judge(name: str, sample: str, plant: Callable[[Results], None] | None = None) -> Verdict:
    outputs = {n: x.clone() for n, x in prepared(name)[2].items()}
    if plant is not None:
        plant(outputs)
    return oracle(name, sample).check(outputs, ALL)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", CASES)
def test_right_results_pass(name: str, sample: str) -> None:
    case, x, outputs = prepared(name)
    verdict = judge(name, sample)
    assert verdict.ok and verdict.message == ""
    names = ALL if case.sinks else ALL[:-1]
    assert list(verdict.errors) == [f"rel_err_{n}" for n in names]
    unit = 2**-8 if case.dtype == "bfloat16" else 2**-11
    assert all(error <= unit for error in verdict.errors.values())
    eager = oracle(name, sample).check(gradients(eager_gradients, x, case.window), ALL)
    assert eager.ok, eager.message
    if sample == "all":
        truth = gradients(attention_reference_gradients, x, case.window)
        for n in names:
            error = relative_error(outputs[n], truth[n])
            assert verdict.errors[f"rel_err_{n}"] == pytest.approx(error, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("name", "sample", "units", "complete"), [
    ("causal", "all", [(0, 0), (1, 0), (0, 1), (1, 1)], True),
    ("causal", "ends", [(0, 0), (1, 1)], False),
    ("causal", "positions", [(0, 0), (1, 1)], False),
    ("fp16", "all", [(0, 0), (0, 1), (0, 2)], True),
    ("fp16", "positions", [(0, 0), (0, 2)], False),
    ("mqa", "positions", [(0, 0), (1, 0)], False),
    ("varlen", "all", [(b, g) for g in (0, 1) for b in range(4)], True),
    ("varlen", "positions", [(0, 0), (3, 1)], False),
])
def test_what_is_sampled(name: str, sample: str, units: list[tuple[int, int]], complete: bool) -> None:
    case, _, outputs = prepared(name)
    it = oracle(name, sample)
    assert it._units == units
    for n, output in (it._forward | it._gradients).items():
        covered = output.expected.truth.numel()
        assert (covered == outputs[n].numel()) == complete and covered > 0
    if sample == "positions":
        _, _, rows = it._forward["o"].parts[0]
        assert rows is not None and {0, 1, case.seqlen_q - 1} <= set(rows.tolist()) and len(rows) <= 64 + 9


def rows_of_o(x: Results) -> None:
    x["o"][0, 299, 3] *= 1.5


def last_key(x: Results) -> None:
    x["dk"][-1, 299, -1] = 0


def swapped_heads(x: Results) -> None:
    x["dq"][:, :, [0, 1]] = x["dq"][:, :, [1, 0]]


def swapped_key_heads(x: Results) -> None:
    x["dv"] = x["dv"].flip(2)


def noise(x: Results) -> None:
    x["dv"] += 0.03 * torch.randn(x["dv"].shape, generator=torch.Generator().manual_seed(0)) * x["dv"]


def lost_sink_gradient(x: Results) -> None:
    x["dsinks"][0] = 0


def one_sequence_twice(x: Results) -> None:
    x["o"][1] = x["o"][0]


def nan_in_the_middle(x: Results) -> None:
    x["dq"][0, 137, 5, 7] = math.nan


def infinity(x: Results) -> None:
    x["lse"][1, 2, 30] = -math.inf


FAULTS: dict[str, tuple[Callable[[Results], None], str]] = {
    "a row of o": (rows_of_o, "o: .*batch 0, head 3, row 299"),
    "the last key's dk": (last_key, "dk: .*batch 1, key head 1, key 299"),
    "query heads swapped": (swapped_heads, "dq: error .* allow"),
    "key heads swapped": (swapped_key_heads, "dv: error .* allow"),
    "3% off": (noise, "dv: error"),
    "a head's dsinks": (lost_sink_gradient, "dsinks: .*head 0,"),
    "a batch written twice": (one_sequence_twice, "o: error"),
    "NaN": (nan_in_the_middle, r"dq: 1 of 153600 values are NaN .* such as nan at index \(0, 137, 5, 7\)"),
    "infinity": (infinity, r"lse: 1 of 4800 values are NaN or infinite, such as -inf at index \(1, 2, 30\)"),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_and_is_found(fault: str, sample: str) -> None:
    plant, message = FAULTS[fault]
    verdict = judge("causal", sample, plant)
    assert not verdict.ok
    with pytest.raises(AssertionError, match=message):      # the message alone, and no other output's
        raise AssertionError(verdict.message)
    assert " | " not in verdict.message


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_window_off_by_one_fails_in_one_tile(sample: str) -> None:
    _, x, outputs = prepared("window")
    wrong = right(x, 41)
    outputs = {n: t.clone() for n, t in outputs.items()}
    outputs["o"][:, 64:128] = wrong["o"][:, 64:128]
    outputs["dq"][:, 64:128] = wrong["dq"][:, 64:128]
    outputs["dk"][:, 128:192] = wrong["dk"][:, 128:192]
    verdict = oracle("window", sample).check(outputs, ALL)
    assert not verdict.ok
    assert [part.split(":")[0] for part in verdict.message.split(" | ")] == ["o", "dq", "dk"]
    assert set(verdict.errors) == {f"rel_err_{n}" for n in ALL}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", ["causal", "window", "fewer queries", "varlen"])
def test_a_missing_sink_fails(name: str, sample: str) -> None:
    case, x, _ = prepared(name)
    without = right(dataclasses.replace(x, sinks=None), case.window)
    verdict = oracle(name, sample).check(without, ALL)
    assert [part.split(":")[0] for part in verdict.message.split(" | ")] == ["o", "lse", "dq", "dk", "dv"]


def test_inputs_without_sinks_are_judged_as_plain_attention() -> None:
    case, x, with_sinks = prepared("window")
    plain = dataclasses.replace(x, sinks=None)
    it = Oracle(case, plain)
    verdict = it.check(right(plain, case.window), ALL)
    assert verdict.ok and set(verdict.errors) == {f"rel_err_{n}" for n in ALL[:-1]}
    assert not it.check(with_sinks, ALL).ok


def test_accumulating_in_half_precision_fails() -> None:
    """dk of every query row and head added to memory in bfloat16, as atomics would."""
    _, x, outputs = prepared("causal")
    it = oracle("causal", "all")
    dk = torch.zeros_like(outputs["dk"])
    truth = gradients(attention_reference_gradients, x, None)
    scores = torch.einsum("bihd,bjhd->bhij", x.q.double(), x.k.double().repeat_interleave(4, 2)) * x.softmax_scale
    p = torch.exp(scores - truth["lse"][..., None]).tril()
    dp = torch.einsum("bihd,bjhd->bhij", x.do.double(), x.v.double().repeat_interleave(4, 2))
    ds = p * (dp - (truth["o"] * x.do.double()).sum(-1).transpose(1, 2)[..., None]) * x.softmax_scale
    exact = torch.zeros_like(truth["dk"])
    for start in range(0, 300, 4):
        for head in range(8):
            rows = slice(start, start + 4)
            part = ds[:, head, rows].mT @ x.q[:, rows, head].double()
            exact[:, :, head // 4] += part
            dk[:, :, head // 4] += part.to(dk.dtype)
    assert relative_error(exact, truth["dk"]) < 1e-12
    verdict = it.check({"dk": dk, "dv": outputs["dv"]}, ("dk", "dv"))
    assert not verdict.ok and verdict.message.startswith("dk: ") and " | " not in verdict.message
    assert it.check({"dk": exact.to(dk.dtype)}, ("dk",)).ok


def test_only_what_is_there_is_judged() -> None:
    _, _, outputs = prepared("causal")
    it = oracle("causal", "all")
    verdict = it.check({"o": outputs["o"]}, OUTPUTS["fwd"])
    assert verdict.ok and list(verdict.errors) == ["rel_err_o"]
    nothing = it.check({}, OUTPUTS["fwd"])
    assert not nothing.ok and nothing.message == "none of the outputs o, lse was returned"
    poisoned = it.check({"o": torch.full_like(outputs["o"], math.nan), "lse": outputs["lse"]}, OUTPUTS["fwd"])
    assert not poisoned.ok and poisoned.message.startswith("o: 153600 of 153600 values are NaN")
    assert list(poisoned.errors) == ["rel_err_lse"]
    shape = it.check({"o": outputs["o"].transpose(1, 2)}, OUTPUTS["fwd"])
    assert not shape.ok and shape.message == "o: expected shape (2, 300, 8, 32), got (2, 8, 300, 32)"


def test_forward_needs_no_gradients() -> None:
    case, x, outputs = prepared("causal")
    it = Oracle(case, x)
    assert it.check(outputs, OUTPUTS["fwd"]).ok
    assert "_forward" in vars(it) and "_gradients" not in vars(it)
    assert it.check(outputs, OUTPUTS["bwd"]).ok
    assert it.check(outputs, OUTPUTS["bwd_dq"]).ok and it.check(outputs, OUTPUTS["bwd_dkdv"]).ok


def test_lse_of_rows_without_keys() -> None:
    case = dataclasses.replace(CASES["more queries"], sinks=False)
    x = gate_inputs(case, "cpu")
    it, outputs = Oracle(case, x), right(x, None)
    assert (outputs["lse"][..., :180] == -math.inf).all() and it.check(outputs, ALL[:-1]).ok
    for at, value in ((179, 0.0), (179, math.nan), (180, -math.inf)):
        lse = outputs["lse"].clone()
        lse[0, 1, at] = value
        assert not it.check({"lse": lse}, ("lse",)).ok
    _, _, with_sinks = prepared("more queries")
    lse = with_sinks["lse"].clone()
    lse[0, 1, 3] = -math.inf
    assert not oracle("more queries", "all").check({"lse": lse}, ("lse",)).ok


def test_inputs_come_from_the_case() -> None:
    case = Case("fwd", "float16", 2, 7, 9, 16, 2, 24, 8, window=3, seed=5)
    x = gate_inputs(case, "cpu")
    shapes = [tuple(t.shape) for t in (x.q, x.k, x.v, x.do)]
    assert shapes == [(2, 7, 16, 24), (2, 9, 2, 24), (2, 9, 2, 8), (2, 7, 16, 8)]
    assert x.q.dtype == torch.float16 and x.softmax_scale == 24**-0.5 and (x.window, x.max_seqlen) == (3, 7)
    assert x.sinks is not None and x.sinks.dtype == torch.float32
    assert all(x.sinks[h] > 2 for h in (0, 8)) and all(x.sinks[h] < -4 for h in (7, 15))
    same, other = gate_inputs(case.with_pass("bwd"), "cpu"), gate_inputs(dataclasses.replace(case, seed=6), "cpu")
    assert torch.equal(same.q, x.q) and same.sinks is not None and torch.equal(same.sinks, x.sinks)
    assert not torch.equal(other.q, x.q)
    packed = gate_inputs(CASES["varlen"], "cpu")
    assert packed.cu_seqlens is not None and packed.cu_seqlens.tolist() == [0, 200, 200, 201, 332]
    assert packed.q.shape == (332, 4, 16) and packed.max_seqlen == 200
    assert gate_inputs(CASES["no sinks"], "cpu").sinks is None


def test_long_sequences_are_sampled_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk holds more scores than the limit, and a window is walked along its band."""
    import flash_sink_attn._reference_blocks as blocks

    seen: list[int] = []
    forward = blocks.ExactArithmetic.forward

    def recording(self: blocks.ExactArithmetic, chunk: blocks.Chunk) -> blocks.Attended:
        seen.append(chunk.q.shape[0] * chunk.visible.numel())
        return forward(self, chunk)

    monkeypatch.setattr(blocks.ExactArithmetic, "forward", recording)
    monkeypatch.setattr(blocks, "CELLS_PER_CHUNK", 1 << 16)
    monkeypatch.setattr(blocks, "WINDOW_CHUNK", 32)
    monkeypatch.setattr("sweeps.gate.WINDOW_CHUNK", 32)
    causal = Case("bwd", "bfloat16", 1, 1024, 1024, 2, 1, 16, 16)
    triangle = 2 * 1024 * 1024 // 2
    for case, sample, total in ((causal, Sample(cells=1000, rows=32), 1.2 * triangle),
                                (dataclasses.replace(causal, window=16), Sample(), 0.12 * triangle)):
        seen.clear()
        Oracle(case, gate_inputs(case, "cpu"), sample=sample).check({}, ())
        assert not seen
        _ = Oracle(case, gate_inputs(case, "cpu"), sample=sample)._gradients
        assert max(seen) <= 1 << 16 and sum(seen) < total
