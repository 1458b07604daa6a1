"""Winners, ties, rivals and best.csv, on rows whose answer is known."""

from __future__ import annotations

import csv
import dataclasses
import json
import random

import pytest

from flash_sink_attn.config import CONFIG_CLASS, HopperFwdConfig, TileConfig
from sweeps.registry import OURS, PEERS, built_in, is_peer, peer_of
from sweeps.select import (
    NOT_RUN,
    TILE_COLUMNS,
    TILE_DEFAULTS,
    best_row,
    config_label,
    interval,
    peer_order,
    select,
    write_best_csv,
)
from tests import synthetic
from tests.synthetic import case, row, tile

FWD = case("gpt-oss", "fwd", 4096, 128)


def only(rows):
    selection = select(rows)
    assert len(selection.results) == 1
    return selection.results[0]


def test_peers_are_the_built_in_baselines():
    assert set(PEERS) == set(built_in()) - set(OURS)
    assert is_peer("upstream_64") and is_peer("cudnn-deterministic") and not is_peer("triton") and not is_peer("mine")
    assert peer_of("fa4_causal") == "fa4" and peer_of("fa45") is None and peer_of("a.b:C") is None
    assert peer_order(["upstream", "fa4", "eager", "fa4_causal"]) == ["eager", "fa4", "fa4_causal", "upstream"]


def test_lowest_time_wins_and_only_ok_rows_count():
    rows = [row(FWD, config=tile(64, 64), ms=0.30), row(FWD, config=tile(64, 32), ms=0.20),
            row(FWD, config=tile(128, 64), status="incorrect", latency_ms=0.05),
            row(FWD, config=tile(128, 128), status="out_of_resources"), row(FWD, "fa4", ms=0.10)]
    result = only(rows)
    assert result.best.config == tile(64, 32)
    assert result.runner_up.config == tile(64, 64)
    assert [m.latency_ms for m in result.ranked] == [0.20, 0.30]
    assert result.margin[0] == pytest.approx(0.5)
    assert result.margin[1] < 0.5 < result.margin[2]
    assert len(result.tied) == 1


def test_order_of_the_log_plays_no_part():
    rows = synthetic.run_rows(small=True)
    expected = {r.case.id: r.best and (r.best.impl, r.best.config) for r in select(rows).results}
    assert len(expected) == 18
    random.Random(1).shuffle(rows)
    assert {r.case.id: r.best and (r.best.impl, r.best.config) for r in select(rows).results} == expected


def test_equal_times_are_decided_by_the_configuration():
    rows = [row(FWD, config=tile(64, n), ms=0.2) for n in (64, 32, 128)]
    assert only(rows).best.config == only(rows[::-1]).best.config == tile(64, 128)  # "128" < "32" < "64"


def test_ties_are_those_whose_interval_overlaps_the_winners():
    rows = [row(FWD, config=tile(64, 32), ms=1.000, noise=0.01), row(FWD, config=tile(64, 64), ms=1.002, noise=0.01),
            row(FWD, config=tile(128, 64), ms=1.050, noise=0.01)]
    result = only(rows)
    assert [m.config for m in result.tied] == [tile(64, 32), tile(64, 64)]
    assert result.best.low < 1.0 < result.best.high
    # 30 samples: the 10th smallest and the 10th largest enclose the median with 95%
    step = 2 * 0.01 / 29
    assert result.best.low == pytest.approx(1 - 0.01 + 9 * step)
    assert result.best.half_width == pytest.approx(0.01 - 9 * step)


def test_interval_of_few_samples_is_their_range():
    assert interval([3.0, 1.0, 2.0], 2.0) == (1.0, 3.0)
    assert interval([], 2.0) == (2.0, 2.0)
    assert interval([float(i) for i in range(1, 31)], 15.5) == (10.0, 21.0)


def test_a_configuration_measured_again_counts_with_its_last_ok_row():
    rows = [row(FWD, config=tile(64, 32), ms=0.10), row(FWD, config=tile(64, 64), ms=0.15),
            row(FWD, config=tile(64, 32), ms=0.20), row(FWD, config=tile(64, 32), status="crashed")]
    result = only(rows)
    assert result.best.config == tile(64, 64) and len(result.ranked) == 2


def test_rivals_and_speedups_of_every_timed_row():
    rows = [row(FWD, config=tile(64, 32), ms=0.10), row(FWD, config=tile(64, 64), ms=0.20, is_default=True),
            row(FWD, "eager", ms=4.0), row(FWD, "sdpa_flash", ms=0.05, is_flash=True, applies_sink=False),
            row(FWD, "fa4", ms=0.15, is_flash=True), row(FWD, "cudnn", ms=0.12, is_flash=True),
            row(FWD, "gptoss_triton", ms=0.11), row(FWD, "fa3", status="unsupported")]
    selection = select(rows)
    result = selection.results[0]
    assert result.flash.impl == "cudnn"                     # the fastest flash row with the sink
    assert result.best_peer.impl == "gptoss_triton"         # the fastest of all with the sink
    assert list(result.peers) == ["sdpa_flash", "gptoss_triton", "cudnn", "fa4", "eager"]
    assert result.peer_failures == {"fa3": "unsupported"}
    filled = {r["impl"] + str(r["BLOCK_N"] or ""): r for r in selection.rows}
    assert filled["triton32"]["speedup_vs_eager"] == pytest.approx(40)
    assert filled["triton32"]["speedup_vs_flash"] == pytest.approx(1.2)
    assert filled["triton32"]["speedup_vs_default"] == pytest.approx(2)
    assert filled["triton64"]["speedup_vs_default"] == pytest.approx(1)
    assert filled["fa4"]["speedup_vs_eager"] == pytest.approx(4 / 0.15)
    assert filled["fa3"]["speedup_vs_eager"] is None


def test_missing_rivals_leave_the_speedup_empty():
    selection = select([row(FWD, config=tile(64, 32), ms=0.10)])
    assert all(selection.rows[0][f"speedup_vs_{x}"] is None for x in ("eager", "flash", "default"))
    assert selection.results[0].speedup(selection.results[0].eager) is None


def test_rows_compiled_only_are_no_candidates():
    result = only([row(FWD, config=tile(64, 32)), row(FWD, config=tile(64, 64))])
    assert result.best is None


def test_heuristic_is_named_by_equal_machine_code():
    rows = [row(FWD, ms=0.1, is_default=True, binary="abc"), row(FWD, config=tile(64, 64), ms=0.2, binary="def"),
            row(FWD, config=tile(64, 32), ms=0.101, binary="abc")]
    result = only(rows)
    assert result.best.config == tile(64, 32) and result.best.latency_ms == 0.101   # measured by name
    assert len(result.ranked) == 2                                                  # and not counted twice
    assert result.default.latency_ms == 0.1 and result.default.config == tile(64, 32)


def test_unnamed_heuristic_wins_only_where_the_noise_allows_no_other():
    tied = [row(FWD, ms=1.000, is_default=True, noise=0.01), row(FWD, config=tile(64, 64), ms=1.001, noise=0.01)]
    assert only(tied).best.config == tile(64, 64) and len(only(tied).tied) == 2
    apart = [row(FWD, ms=1.0, is_default=True), row(FWD, config=tile(64, 64), ms=1.2)]
    assert only(apart).best.config == {}


def test_cards_are_never_mixed():
    rows = [row(FWD, config=tile(64, 32), ms=0.1), row(FWD, config=tile(64, 64), ms=0.05) | {"gpu": "NVIDIA H200"}]
    selection = select(rows)
    assert [r.gpu for r in selection.results] == [synthetic.GPU, "NVIDIA H200"]
    assert selection.on("NVIDIA H200").results[0].best.latency_ms == 0.05
    assert len(selection.on("NVIDIA H200").rows) == 1


def test_configuration_labels():
    assert config_label(tile(64, 32, PACK_GQA=True)) == "64x32 w4 s3 pack"
    assert config_label(tile(64, 32, 8, 2, SPLIT_LOOPS=False, maxnreg=96)) == "64x32 w8 s2 oneloop r96"
    assert config_label({"bwd_dq": tile(64, 64), "bwd_dkdv": tile(32, 64)}) == "dq 64x64 w4 s3 | dkdv 32x64 w4 s3"
    assert config_label(tile(64, 64, TMA=False)) == "64x64 w4 s3"
    assert config_label(tile(64, 64, TMA=True, PACK_GQA=True, cta=2)) == "64x64 w4 s3 pack tma cta=2"
    assert config_label({"BLOCK_M": 64, "BLOCK_N": 32}) == "64x32"
    assert config_label(TileConfig(64, 32).to_dict()) == "64x32 w4 s2"
    assert config_label({}) == "default" and config_label({"block": 64}) == "block=64"


def test_labels_know_every_field_of_a_tile_and_its_default():
    for of in set(CONFIG_CLASS.values()):  # one name never has two defaults
        rest = {f.name: f.default for f in dataclasses.fields(of) if f.name not in TILE_COLUMNS}
        assert rest.items() <= TILE_DEFAULTS.items()
    assert config_label(HopperFwdConfig(64, 128, 3, 2, 4, 2, False, True, 2, 80).to_dict()) == (
        "64x128 s3 oneloop r80 q2 h4 pack2 shareq p2")
    both = {"hopper_fwd": {"BLOCK_M": 64, "BLOCK_N": 64}, "hopper_bwd": {"BLOCK_M": 64, "BLOCK_N": 128, "FORM": 1}}
    assert config_label(both) == "fwd 64x64 | bwd 64x128 form1"


def test_the_best_of_both_implementations_is_the_cases_best():
    c = case("gpt-oss", "bwd", 1024)
    pair, one = {"bwd_dq": tile(64, 64), "bwd_dkdv": tile(64, 64)}, {"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 2}
    rows = [row(c, config=pair, ms=0.30, is_default=True),
            row(c, "hopper", one, ms=0.25, num_warps=12, is_default=True)]
    (result,) = select(rows).results
    found = best_row(result)
    assert (found["impl"], found["BLOCK_N"], found["num_warps"], found["latency_ms"]) == ("hopper", 128, 12, 0.25)
    assert found["speedup_vs_default"] == pytest.approx(1.2) and found["is_default"] is False


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    path = tmp_path_factory.mktemp("select") / "best.csv"
    rows = synthetic.run_rows(small=True)
    write_best_csv(select(rows), path)
    with path.open() as f:
        found = list(csv.DictReader(f))
    assert len(found) == len({r["case"] for r in rows})
    return rows, {r["case"]: r for r in found}


def test_best_csv_names_the_fastest_ok_row_of_every_case(best):
    rows, found = best
    for case_id, b in found.items():
        own = [r for r in rows if r["case"] == case_id and r["impl"] == "triton" and r["status"] == "ok"]
        if not own:
            continue
        fastest = min(own, key=lambda r: r["latency_ms"])
        assert b["status"] == "ok" and b["message"] == ""
        assert json.loads(b["config"]) == fastest["config"]
        assert float(b["latency_ms"]) == fastest["latency_ms"]
        assert float(b["latency_ms_low"]) <= float(b["latency_ms"]) <= float(b["latency_ms_high"])
        assert b["window"] == ("" if fastest["window"] is None else str(fastest["window"]))
        assert len(json.loads(b["tie_set"])) == int(b["ties"]) >= 1


def test_best_csv_has_every_rivals_time(best):
    rows, found = best
    b = found[case("gpt-oss", "fwd", 2048).id]
    ms = {r["impl"]: r["latency_ms"] for r in rows if r["case"] == b["case"] and r["impl"] != "triton"}
    for peer in PEERS:
        assert b[f"{peer}_ms"] == ("" if ms.get(peer) is None else str(ms[peer]))
    assert b["best_peer"] == "fa3" == b["flash_impl"]
    assert float(b["speedup_vs_best_peer"]) == pytest.approx(ms["fa3"] / float(b["latency_ms"]))
    assert float(b["speedup_vs_eager"]) == pytest.approx(ms["eager"] / float(b["latency_ms"]))
    assert b["peers_without_sink"] == "sdpa_cudnn sdpa_flash"
    assert json.loads(b["peers_failed"]) == {"fa2": "unavailable"}
    assert float(b["speedup_vs_default"]) == pytest.approx(float(b["default_ms"]) / float(b["latency_ms"])) and (
        float(b["speedup_vs_default"]) > 1)


def test_best_csv_of_a_backward_has_the_pair(best):
    b = best[1][case("gpt-oss", "bwd", 1024, 128).id]
    assert (b["dq_BLOCK_M"], b["dq_BLOCK_N"], b["dkdv_BLOCK_M"], b["dkdv_BLOCK_N"]) == ("64", "64", "64", "64")
    assert b["BLOCK_M"] == "" and set(json.loads(b["config"])) == {"bwd_dq", "bwd_dkdv"}
    assert json.loads(b["peers_failed"])["upstream"] == "incorrect" and b["upstream_ms"] == ""


def test_best_csv_says_why_a_case_has_no_winner(best):
    dead, unreached = best[1][case("gpt-oss", "fwd", 64, 16).id], best[1][case("gpt-oss", "bwd", 64, 16).id]
    assert dead["status"] == "crashed" and dead["message"] == "no candidate was ok: 2 crashed, 1 runtime_error"
    assert dead["latency_ms"] == "" and dead["eager_ms"] == "0.05" and dead["candidates"] == "3"
    assert unreached["status"] == NOT_RUN and "no candidate of ours" in unreached["message"]


def test_a_single_candidate_is_a_winner_without_a_margin(tmp_path):
    write_best_csv(select([row(FWD, config=tile(64, 32), ms=0.1)]), tmp_path / "best.csv")
    with (tmp_path / "best.csv").open() as f:
        (b,) = csv.DictReader(f)
    assert b["status"] == "ok" and b["margin"] == "" and b["runner_up"] == "" and b["ties"] == "1"


def test_no_rows_give_an_empty_table(tmp_path):
    write_best_csv(select([]), tmp_path / "best.csv")
    assert (tmp_path / "best.csv").read_text() == "case\n"


def test_variants_of_a_peer_have_columns_of_their_own(tmp_path):
    rows = [row(FWD, config=tile(64, 32), ms=0.1), row(FWD, "upstream_64", {}, ms=0.3),
            row(FWD, "upstream", {}, ms=0.4)]
    write_best_csv(select(rows), tmp_path / "best.csv")
    with (tmp_path / "best.csv").open() as f:
        (b,) = csv.DictReader(f)
    assert b["upstream_64_ms"] == "0.3" and b["upstream_ms"] == "0.4" and b["best_peer"] == "upstream_64"
