"""Placements of the inputs: copies that lie elsewhere, contests that go round them, and what their samples say."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps import worker as worker_module
from sweeps import workers
from sweeps.contest import PLACED_UP_TO_MS, Elsewhere, time_finalists
from sweeps.final_timing import FinalTiming
from sweeps.finals import Final
from sweeps.gate import gate_inputs
from sweeps.measure import CpuTimer
from sweeps.ours import TRITON
from sweeps.paired import MIN_PAIRS, ratio, standing
from sweeps.placements import PLACING, empty_beside, moved, nbytes
from sweeps.repeat import TRUTH
from sweeps.sampling import FinalSampling
from sweeps.select import select
from sweeps.specfile import SpecError, parse_spec
from sweeps.store import read_finals
from sweeps.supervisor import Supervisor
from tests.kernel_calls import DEVICE
from tests.placing_worker import Timer
from tests.synthetic import GPU, case, row, tile
from tests.test_contest import QUICK, Simulated, calls
from tests.test_runner import CASE, make_spec, trials
from tests.test_runner_finals import final, go

MARGIN = 0.003


# ---- other memory


@pytest.mark.parametrize("changes", [{}, {"varlen": "two", "seqlens": (5, 7), "sinks": False}])
def test_a_further_placement_is_the_same_inputs_in_other_memory(changes: dict[str, Any]) -> None:
    inputs = gate_inputs(dataclasses.replace(CASE, **changes), "cpu")
    inputs = dataclasses.replace(inputs, q=inputs.q.transpose(-1, -2).contiguous().transpose(-1, -2))
    copies = [inputs, *(moved(inputs, number) for number in range(1, 9))]
    names = [f.name for f in dataclasses.fields(inputs) if isinstance(getattr(inputs, f.name), torch.Tensor)]
    assert len(names) == 5 and {"q", "k", "v", "do"} < set(names)
    for copy in copies[1:]:
        assert (copy.window, copy.softmax_scale, copy.max_seqlen) == (
            inputs.window, inputs.softmax_scale, inputs.max_seqlen)
        for name in names:
            ours, theirs = getattr(copy, name), getattr(inputs, name)
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
            assert ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
        assert (copy.sinks is None) == (inputs.sinks is None)
    # how far into its memory each begins: aligned as callers' tensors are, and no two alike modulo a page
    into = {(number, name): getattr(copy, name).storage_offset() * getattr(copy, name).element_size()
            for number, copy in enumerate(copies) for name in names}
    assert all(x % 512 == 0 and x < 2 << 20 for x in into.values())
    for name in names:
        assert len({into[number, name] % (1 << 16) for number in range(len(copies))}) == len(copies)
    for number in range(1, len(copies)):
        assert len({into[number, name] for name in names}) == len(names)
    assert nbytes(inputs) >= max(sum(getattr(copy, name).untyped_storage().nbytes() for name in names)
                                 for copy in copies[1:])
    with pytest.raises(ValueError, match="number: expected at least 1, got 0"):
        moved(inputs, 0)


def test_a_result_lies_as_far_into_its_memory_as_the_input_it_is_beside() -> None:
    x = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)
    far = torch.empty(1 << 20, dtype=torch.bfloat16)[1280:1304].view(2, 3, 4)
    for source, into in ((x, 0), (far, 2560), (torch.empty(99, dtype=torch.int8)[33:], 0)):
        for dtype in (None, torch.float32):
            made = empty_beside(source, (2, 5), dtype)
            assert made.shape == (2, 5) and made.is_contiguous() and made.dtype == (dtype or source.dtype)
            assert made.storage_offset() * made.element_size() == into
    assert empty_beside(far, (0, 4)).shape == (0, 4)


def test_our_calls_compute_the_same_on_every_placement_into_memory_of_their_own() -> None:
    inputs = gate_inputs(CASE, DEVICE)
    for pass_ in ("fwd", "bwd"):
        the_case = dataclasses.replace(CASE, pass_=pass_)
        first, second = (TRITON.prepare(the_case, {}, x) for x in (inputs, moved(inputs, 3)))
        first.run()
        second.run()
        for name, x in second.outputs().items():
            assert torch.equal(x, first.outputs()[name]) and x.data_ptr() != first.outputs()[name].data_ptr()
            assert x.storage_offset() > 0 or name == "dsinks"


# ---- what is made of the samples


def sampled(effects: Sequence[float], blocks: int, noise: float = 0.003, seed: int = 0
            ) -> tuple[list[list[float]], list[int]]:
    """Two contestants in so many blocks, the second slower by a share that each placement has of its own."""
    rng = random.Random(seed)
    places = [block % len(effects) for block in range(blocks)]
    first = [math.exp(rng.gauss(0, noise)) for _ in places]
    return [first, [(1 + effects[place]) * math.exp(rng.gauss(0, noise)) for place in places]], places


def test_one_whom_a_placement_contradicts_is_not_slower_however_many_blocks_there_are() -> None:
    """By Wilcoxon's interval of all blocks it is slower beyond doubt."""
    for effects in ((0.02, 0.02, 0.02, -0.015), (0.03, 0.03, 0.03, 0.001)):
        samples, places = sampled(effects, 400)
        assert standing(samples, MARGIN).tied == (0,)
        now = standing(samples, MARGIN, places)
        assert now.best == 0 and now.tied == (0, 1) and not now.decided
        alone, both = standing(samples, MARGIN).ratios[1], now.ratios[1]
        assert both.low < 1 + MARGIN < alone.low and both.low == pytest.approx(1 + effects[3], abs=0.002)
        assert both.high >= 1 + effects[0] - 0.002 > alone.high and both.ratio == alone.ratio
        assert both.half_width == alone.half_width == pytest.approx((alone.high - alone.low) / 2)


def test_one_who_is_slower_in_every_placement_is_slower() -> None:
    samples, places = sampled((0.03, 0.008, 0.02, 0.012), 400)
    now = standing(samples, MARGIN, places)
    assert now.tied == (0,) and now.decided and now.ratios[1].low == pytest.approx(1.008, abs=0.002)


def test_as_good_as_each_other_is_meant_of_every_placement() -> None:
    samples, places = sampled((0.01, -0.01), 400, noise=0.0005)
    assert not standing(samples, MARGIN, places).decided
    assert standing(sampled((0.0, 0.0), 400, noise=0.0005)[0], MARGIN, places).decided


def test_one_placement_is_as_none() -> None:
    samples, _ = sampled((0.004,), 40)
    assert standing(samples, MARGIN) == standing(samples, MARGIN, [0] * 40) == standing(samples, MARGIN, ())
    with pytest.raises(ValueError, match="placements: expected one for each of 40 pairs, got 39"):
        ratio(*samples, placements=[0] * 39)
    assert ratio(samples[0][:20], samples[1], placements=[0, 1] * 10).ratio > 0  # of those that both have


# ---- the contest


def placed(*ms: Sequence[float]) -> tuple[list[Callable[[], Any]], Elsewhere, list[int]]:
    """Calls by their milliseconds on each placement: those on the first, a maker of the others, what it was asked."""
    asked: list[int] = []

    def elsewhere(wanted: int) -> tuple[list[list[Callable[[], Any]]], str]:
        asked.append(wanted)
        return [calls(*own) for own in ms[1:wanted]], "" if wanted <= len(ms) else f"{len(ms)}: no room"

    return calls(*ms[0]), elsewhere, asked


def contest(timer: Any, *ms: Sequence[float], sampling: FinalSampling = QUICK, seed: int = 0) -> FinalTiming:
    first, elsewhere, _ = placed(*ms)
    return time_finalists(timer, first, sampling, seed, elsewhere)


FLIPS = ((0.1, 0.102), (0.102, 0.1), (0.1, 0.1015), (0.1012, 0.1))


def test_what_placements_turn_round_is_a_tie() -> None:
    for seed in range(10):
        one = contest(Simulated(seed=seed), *FLIPS, sampling=dataclasses.replace(QUICK, placements=1), seed=seed)
        assert one.stop_reason == "winner" and one.standing.tied == (0,)
        four = contest(Simulated(seed=seed), *FLIPS, seed=seed)
        assert four.stop_reason in ("precision", "samples") and sorted(four.standing.tied) == [0, 1]


def test_rivals_that_placements_move_apart_at_random_seldom_have_a_winner() -> None:
    def winners(placements: int) -> int:
        rng, found = random.Random(5), 0
        for seed in range(60):
            ms = [(0.1, 0.1 * math.exp(rng.gauss(0, 0.01))) for _ in range(4)]
            timing = contest(Simulated(seed=seed), *ms, sampling=dataclasses.replace(
                QUICK, placements=placements, max_blocks=40), seed=seed)
            found += timing.stop_reason == "winner"
        return found

    assert winners(1) > 20 and winners(4) <= 6


@pytest.mark.parametrize(("slower", "blocks"), [(0.03, 0), (0.02, 0), (0.01, 4)])
def test_a_clear_winner_is_found_with_as_few_blocks(slower: float, blocks: float) -> None:
    """On average, where placements do not matter."""
    taken = Counter[int]()
    for seed, placements in itertools.product(range(20), (1, 4)):
        timing = contest(Simulated(seed=seed), *[(0.1, 0.1 * (1 + slower), 0.12)] * 4, seed=seed,
                         sampling=dataclasses.replace(QUICK, placements=placements))
        assert timing.stop_reason == "winner" and timing.standing.tied == (0,)
        taken[placements] += len(timing.samples_ms[0])
    assert taken[4] <= taken[1] + 20 * blocks and taken[1] >= 20 * MIN_PAIRS


def test_all_of_a_block_have_the_same_placement_and_the_next_one_has_the_next() -> None:
    ms = [(0.1 + place / 1000, 0.2 + place / 1000, 0.3 + place / 1000) for place in range(4)]
    timing = contest(Simulated(noise=0.0), *ms, sampling=dataclasses.replace(QUICK, race=False, max_blocks=18))
    assert timing.block_placements == (0, 1, 2, 3) * 4 + (0, 1)[:len(timing.block_placements) - 16]
    for own, first in zip(timing.samples_ms, (0.1, 0.2, 0.3), strict=True):
        assert own == pytest.approx([first + place / 1000 for place in timing.block_placements], rel=1e-3)
    fields = timing.row_fields()
    assert fields["placements"] == 4 and fields["placements_note"] == ""
    assert fields["block_placements"] == list(timing.block_placements) and len(fields["block_placements"]) == 18


def test_placements_stay_balanced_whichever_blocks_are_thrown_away() -> None:
    timer = Simulated()
    timer.late = [n % 7 == 3 for n in range(60)]
    timing = contest(timer, *[(0.1, 0.1)] * 4, sampling=dataclasses.replace(QUICK, race=False, precision=1e-9,
                                                                           max_blocks=40))
    counts = Counter(timing.block_placements)
    assert timing.late_blocks > 4 and len(timing.samples_ms[0]) == len(timing.block_placements) == 40
    assert max(counts.values()) - min(counts.values()) <= 2
    timer.late = [True] * 100_000
    bound = contest(timer, *[(0.1, 0.12)] * 4)
    assert bound.mode == "host_bound" and len(bound.block_placements) == len(bound.samples_ms[0])


def test_every_placement_has_had_a_block_before_anybody_is_out() -> None:
    timing = contest(Simulated(), *[(0.1, 0.13)] * 12, sampling=dataclasses.replace(QUICK, placements=12))
    assert timing.stop_reason == "winner" and sorted(timing.block_placements) == list(range(12))


def test_where_one_placement_is_enough_no_other_is_made() -> None:
    long = 1.5 * PLACED_UP_TO_MS
    first, elsewhere, asked = placed(*[(long, 2 * long)] * 4)
    timing = time_finalists(Simulated(), first, QUICK, 0, elsewhere)
    assert asked == [] and timing.row_fields()["placements"] == 1 and timing.row_fields()["block_placements"] == []
    assert timing.placements_note == "1: a call takes 1.5 ms, more than 1"
    first, elsewhere, asked = placed(*[(0.1, 0.1)] * 4)
    for alone, timer, sampling in ((first, Simulated(), dataclasses.replace(QUICK, placements=1)),
                                   (first[:1], Simulated(), QUICK),
                                   ([lambda: None] * 2, CpuTimer(), QUICK)):
        assert time_finalists(timer, alone, sampling, 0, elsewhere).row_fields()["placements"] == 1  # type: ignore[arg-type]
    assert asked == [] and time_finalists(Simulated(), first, QUICK, 0, elsewhere).placements_note == ""
    assert asked == [4]


def test_where_there_is_no_room_for_all_the_record_says_how_many_there_are() -> None:
    fields = contest(Simulated(), *[(0.1, 0.13)] * 2).row_fields()
    assert fields["placements"] == 2 and fields["placements_note"] == "2: no room"


def test_a_call_that_fails_elsewhere_loses_no_sample() -> None:
    class Fails(Simulated):
        def batch(self, calls: Sequence[Any], spin_ms: float) -> Any:
            if len(self.batches) == 1 and any(call() != 0.1 for call in calls):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().batch(calls, spin_ms)

    ms = [(0.1, 0.1), *[(0.1001, 0.1001)] * 3]
    timing = contest(Fails(), *ms, sampling=dataclasses.replace(QUICK, race=False, precision=1e-9, max_blocks=40))
    before = timing.block_placements.index(0, 5)
    assert timing.placements_note.startswith("1 from block 9 on: OutOfMemoryError: CUDA out of memory")
    assert timing.block_placements == (0, 1, 2, 3) * 2 + (0,) * 32 and before == 8
    assert [len(own) for own in timing.samples_ms] == [40, 40]
    with pytest.raises(torch.OutOfMemoryError):  # on the first placement it is not theirs
        time_finalists(Fails(), calls(0.2, 0.2), QUICK, 0)


# ---- in the log, and read from it


A, B = tile(64, 32), tile(64, 64)
FWD = case("gpt-oss", "fwd", 4096, 128)


def test_a_verdict_from_the_log_knows_the_placements() -> None:
    fields = contest(Simulated(), *FLIPS).row_fields()
    rows = [row(FWD, config=A, ms=0.1), row(FWD, config=B, ms=0.1005)]
    entrants = [own | {"key": r["key"], "trial": "", "impl": "triton", "config": r["config"], "status": "ok",
                       "message": ""} for own, r in zip(fields["entrants"], rows, strict=True)]
    record = {"key": "f", "case": FWD.id, "gpu": GPU, "status": "ok", "message": "", **fields, "entrants": entrants}
    result = select(rows, [record]).results[0]
    assert len(result.tied) == 2 and result.margin is not None and result.margin[1] < 0 < result.margin[2]
    # and a record from before there were any is read as it was
    for name in ("placements", "placements_note", "block_placements"):
        del record[name]
    old = select(rows, [record]).results[0]
    assert old.margin is not None and old.margin[2] - old.margin[1] < result.margin[2] - result.margin[1]


def test_how_many_is_a_setting_of_finals() -> None:
    text = "name: p\ndevice: null\nshapes: {model: gpt-oss, seqlen: 1024}\ntiming: {finals: {placements: COUNT}}\n"
    assert parse_spec(text.replace("COUNT", "7")).timing.finals.placements == 7
    assert parse_spec(text.replace("placements: COUNT", "")).timing.finals.placements == 4
    for bad in ("0", "-1", "1.5", "many"):
        with pytest.raises(SpecError, match=rf"timing\.finals\.placements: .*got '?{bad}"):
            parse_spec(text.replace("COUNT", bad))
    assert TRUTH.placements > FinalSampling().placements


# ---- the worker's side


def asked_for(*ways: str, **sampling: Any) -> dict[str, Any]:
    return {"final": "f", "case": CASE.to_dict(), "gate": True, "seed": 1, "entrants": [
        {"implementation": "tests.fakes:make", "options": {}, "config": {"n": n, "do": way}}
        for n, way in enumerate(ways)],
        "sampling": dataclasses.asdict(dataclasses.replace(QUICK, max_blocks=12, **sampling))}


def held(request: dict[str, Any], timer: Timer, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[str]]:
    """The fields of a final in a worker of this process, and the stages that it went through."""
    monkeypatch.setattr(worker_module, "timer_for", lambda device: timer)
    said: list[str] = []
    return worker_module.Worker(lambda event: said.append(event["stage"])).final(request), said


def test_a_worker_prepares_every_entrant_on_each_placement_and_checks_it_on_the_first(
        monkeypatch: pytest.MonkeyPatch) -> None:
    fields, stages = held(asked_for("ok", "incorrect", "ok"), Timer(), monkeypatch)
    assert fields["status"] == "ok" and [e["status"] for e in fields["entrants"]] == ["ok", "incorrect", "ok"]
    assert fields["placements"] == 4 and fields["placements_note"] == "" and "lost_placing" not in fields
    assert fields["block_placements"] == [0, 1, 2, 3] * 2
    assert stages.count(PLACING) == 1 and stages.count("gate") == 3 and stages.count("check") == 2
    assert fields["seconds"][PLACING] > 0
    for ways, sampling, timer in ((("ok", "ok"), {"placements": 1}, Timer()), (("ok",), {}, Timer()),
                                  (("ok", "ok"), {}, Timer(call_ms=2.0))):
        fields, stages = held(asked_for(*ways, **sampling), timer, monkeypatch)
        assert PLACING not in stages and fields["placements"] == 1


@pytest.mark.parametrize("way", ["oom_elsewhere", "runtime_error_elsewhere", "out_of_resources_elsewhere"])
def test_a_placement_that_fails_leaves_the_final_with_those_that_are_there(
        way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, _ = held(asked_for("ok", way), Timer(), monkeypatch)
    assert fields["status"] == "ok" and [e["status"] for e in fields["entrants"]] == ["ok", "ok"]
    assert fields["placements"] == 1 and fields["placements_note"].startswith("1: ")
    assert all(len(e["samples_ms"]) >= MIN_PAIRS for e in fields["entrants"])


def test_placements_take_no_more_than_their_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    each = 100 << 20
    monkeypatch.setattr(worker_module.Worker, "_total_memory", lambda self: each * 26.0)
    # before and after the entrants were prepared; then before any further placement, and before each of three
    fields, _ = held(asked_for("ok", "ok"), Timer([0, each, each, each, 2 * each, 3 * each]), monkeypatch)
    assert fields["placements"] == 3
    assert fields["placements_note"] == ("3: one more would take 110 MiB, all but the first may take 10% of the "
                                         "device's memory")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_final_of_ours_goes_round_placements() -> None:
    request = asked_for(race=False) | {"case": case("gpt-oss", "bwd", 1024, 128).to_dict(), "entrants": [
        {"implementation": "triton", "options": {}, "config": {"bwd_dq": tile(64, n), "bwd_dkdv": tile(64, 64)}}
        for n in (32, 64)]}
    before = torch.cuda.memory_allocated()
    worker = worker_module.Worker(lambda event: None)
    fields = worker.final(request)
    assert fields["status"] == "ok" and [e["status"] for e in fields["entrants"]] == ["ok", "ok"]
    assert fields["placements"] == 4 and fields["placements_note"] == "" and MIN_PAIRS <= fields["blocks"] <= 12
    assert fields["seconds"][PLACING] < 1
    worker._forget(keep=0)
    worker._timer = None  # type: ignore[assignment]  # its flush is the largest
    assert torch.cuda.memory_allocated() - before < 64 << 20  # the copies are gone


@pytest.mark.parametrize("healthy", [True, False])
def test_what_fails_after_the_contest_costs_the_final_only_where_it_broke_the_context(
        monkeypatch: pytest.MonkeyPatch, healthy: bool) -> None:
    timer, well = Timer(), [True]
    monkeypatch.setattr(worker_module.Worker, "_healthy", lambda worker: well[0])

    def energy(call: object, duration_ms: float) -> None:
        well[0] = healthy
        raise RuntimeError("no loop")

    monkeypatch.setattr(timer, "energy", energy)
    fields, _ = held(asked_for("ok", "ok", energy_ms=1.0), timer, monkeypatch)
    if healthy:
        assert [e["status"] for e in fields["entrants"]] == ["ok", "ok"] and fields["entrants"][0]["samples_ms"]
        assert "no energy: RuntimeError: no loop" in fields["note"]
    else:
        assert fields["status"] == "runtime_error" and "context broke: no energy" in fields["message"]
        assert [e["status"] for e in fields["entrants"]] == ["runtime_error", "runtime_error"]


@pytest.fixture
def placing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the runner's workers go round placements without a GPU."""
    monkeypatch.setattr(workers, "Supervisor", functools.partial(Supervisor, module="tests.placing_worker"))


@pytest.mark.parametrize(("way", "says"), [("ok", ""), ("sigkill_elsewhere", "SIGKILL"), ("hang_elsewhere", "limit"),
                                           ("runtime_error_elsewhere", "context broke")])
def test_a_worker_that_dies_of_a_placement_costs_the_placements_only(
        tmp_path: Path, placing: None, monkeypatch: pytest.MonkeyPatch, way: str, says: str) -> None:
    if "context" in says:
        monkeypatch.setenv("CONTEXT_BREAKS", "1")
    spec = make_spec(measure_timeout_s=10.0, finals={"wall_ms": 0.0, "energy_ms": 0.0})  # type: ignore[arg-type]
    finals: list[Any] = [final(spec, {"n": 0}, {"n": 1, "do": way}), final(spec, {"n": 2}, {"n": 3})]
    summary = go(spec, tmp_path / "run", finals)
    assert (summary.new_finals, summary.remaining) == (2, 0)
    records = {record["final"]: record for record in read_finals(tmp_path / "run")}
    first, second = (records[one.id] for one in finals)
    for record in (first, second):
        assert record["status"] == "ok" and [e["status"] for e in record["entrants"]] == ["ok", "ok"]
        assert record["entrants"][0]["samples_ms"] and "lost_placing" not in record
    assert (second["placements"], second["placements_note"]) == (4, "")
    assert first["placements"] == (1 if says else 4) and says in first["placements_note"]
    assert first["placements_note"].startswith("1: ") == bool(says)
    assert go(spec, tmp_path / "run", finals).new_finals == 0


def test_one_that_dies_without_placements_as_well_is_not_tried_a_third_time(tmp_path: Path, placing: None) -> None:
    spec = make_spec(finals={"wall_ms": 0.0, "energy_ms": 0.0})  # type: ignore[arg-type]
    go(spec, tmp_path / "run", [Final(CASE, tuple(trials(spec, {"n": 0}, {"n": 1, "do": "sigkill"})))])
    (record,) = read_finals(tmp_path / "run")
    assert record["status"] == "crashed" and "placements_note" not in record
