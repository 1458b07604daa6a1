"""From a run to the tuned table: which entries, which keys, what a merge keeps."""

from __future__ import annotations

import json

import pytest

from flash_sink_attn.config import HopperBwdConfig, HopperFwdConfig, TileConfig
from flash_sink_attn.kernel_code import kernel_code_hash
from flash_sink_attn.tuned_table import Entry, ShapeKey, TunedTable, TunedTableError
from sweeps.cases import Case
from sweeps.environment import kernel_source_hash
from sweeps.export import default_path, export, exported_line, merge, shape_key, table_entries
from sweeps.select import select
from sweeps.store import StoreError
from tests import synthetic
from tests.synthetic import case, row, tile

FWD = case("gpt-oss", "fwd", 4096, 128)
KEY = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, 128, 1, 4096, 4096)
PAIR = {"bwd_dq": tile(64, 32), "bwd_dkdv": tile(32, 64)}


def entries(rows) -> dict[tuple[str, ShapeKey], Entry]:
    return {(e.kernel, e.key): e for e in table_entries(select(rows), "run")}


def test_round_trip_from_a_run_to_a_lookup(tmp_path):
    rows = synthetic.run_rows(small=True)
    run = synthetic.write_run(tmp_path / "20260102T030405Z-h100", rows)
    done = export(run, tmp_path / "h100.json", tolerance=0)
    path = done.path
    assert path == tmp_path / "h100.json" and (done.entries, done.total, done.worst) == (12, 12, 1.0)
    table = TunedTable.load(path)
    assert table.gpu == "h100" and table.arch == 90 and set(table.runs) == {"20260102T030405Z-h100"}
    facts = table.runs["20260102T030405Z-h100"]
    assert (facts["triton"], facts["kernel_source"], facts["gpu_name"]) == ("3.6.0", "aaaaaaaaaaaa", synthetic.GPU)
    assert facts["date"] == "2026-01-02T03:04:05+00:00"
    selection = select(rows)
    assert len(table.entries) == 4 * 3          # four shapes, three kernels
    for seqlen in (1024, 2048):
        for window in (None, 128):
            key = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, window, 1, seqlen, seqlen)
            fwd = selection.get(case("gpt-oss", "fwd", seqlen, window).id)
            assert table.exact("fwd", key) == TileConfig(**fwd.best.config)
            assert table.entry("fwd", key).latency_ms == fwd.best.latency_ms
            assert table.entry("fwd", key).default_ms == fwd.default.latency_ms
            pair = selection.get(case("gpt-oss", "bwd", seqlen, window).id).best
            for kernel in ("bwd_dq", "bwd_dkdv"):
                assert table.exact(kernel, key) == TileConfig(**pair.config[kernel])
                assert table.entry(kernel, key).measured_as == "bwd"
                assert table.entry(kernel, key).latency_ms == pair.latency_ms
    text = path.read_text()
    assert export(run, path, tolerance=0).path.read_text() == text            # exporting again changes nothing
    assert str(tmp_path) not in text


def test_default_path_is_the_package_data():
    path = default_path("h100")
    assert path.parts[-3:] == ("flash_sink_attn", "tuned", "h100.json")


def test_backward_pair_goes_before_the_winners_of_its_parts():
    dq = row(case("gpt-oss", "bwd_dq", 4096, 128), config=tile(128, 64), ms=0.05)
    whole = row(case("gpt-oss", "bwd", 4096, 128), config=PAIR, ms=0.2)
    assert entries([dq])["bwd_dq", KEY].config == TileConfig(**tile(128, 64))
    assert entries([dq])["bwd_dq", KEY].measured_as == "bwd_dq"
    found = entries([dq, whole])
    assert found["bwd_dq", KEY].config == TileConfig(**PAIR["bwd_dq"])
    assert found["bwd_dkdv", KEY].config == TileConfig(**PAIR["bwd_dkdv"])


def timed(seqlen, pass_="fwd", **ms):
    """Rows of one case, its tiles named by letters."""
    tiles = {"a": tile(64, 32), "b": tile(64, 64), "c": tile(128, 64)}
    c = case("gpt-oss", pass_, seqlen, 128)
    return [row(c, config=tiles[name], ms=time) for name, time in ms.items()]


def test_the_fewest_configurations_within_a_percent_of_each_best():
    rows = [*timed(1024, a=0.1000, c=0.1005, b=0.2), *timed(2048, b=0.2000, c=0.2010), *timed(4096, c=0.4, a=0.5)]
    found = {e.key.seqlen_q: e for e in entries(rows).values()}
    assert {e.config.BLOCK_M for e in found.values()} == {128}         # c serves all three
    assert found[1024].latency_ms == 0.1005 and found[1024].best_ms == 0.1000
    assert found[4096].latency_ms == found[4096].best_ms == 0.4
    own = {e.key.seqlen_q: e for e in table_entries(select(rows), "run", 0.0)}
    tiles = [(own[n].config.BLOCK_M, own[n].config.BLOCK_N) for n in (1024, 2048, 4096)]
    assert tiles == [(64, 32), (64, 64), (128, 64)]


def test_what_is_more_than_a_percent_slower_is_not_used():
    rows = [*timed(1024, a=0.1, c=0.102), *timed(2048, c=0.2, a=0.203)]
    assert {e.key.seqlen_q: e.config.BLOCK_M for e in entries(rows).values()} == {1024: 64, 2048: 128}


def test_families_do_not_share_a_cover():
    causal = case("gpt-oss", "fwd", 1024, None)
    rows = [*timed(1024, a=0.1, c=0.1005), row(causal, config=tile(128, 64), ms=0.1)]
    assert entries(rows)["fwd", KEY._replace(seqlen_q=1024, seqlen_k=1024)].config == TileConfig(**tile(64, 32))


def test_a_backward_kernel_may_leave_the_winning_pair_for_one_as_fast():
    pair = {"bwd_dq": tile(64, 32), "bwd_dkdv": tile(32, 64)}
    rows = [*timed(1024, "bwd_dq", a=0.1, c=0.1004), row(case("gpt-oss", "bwd", 1024, 128), config=pair, ms=0.3),
            *timed(2048, "bwd_dq", c=0.2, a=0.3)]
    found = {(e.kernel, e.key.seqlen_q): e for e in entries(rows).values()}
    dq = found["bwd_dq", 1024]
    assert dq.config == TileConfig(**tile(128, 64)) and dq.measured_as == "bwd_dq"
    assert (dq.latency_ms, dq.best_ms) == (0.1004, 0.1)
    dkdv = found["bwd_dkdv", 1024]
    assert dkdv.config == TileConfig(**tile(32, 64)) and (dkdv.measured_as, dkdv.latency_ms) == ("bwd", 0.3)


def test_the_summary_of_an_export(tmp_path):
    rows = [*timed(1024, a=0.1000, c=0.1005), *timed(2048, b=0.2000, c=0.2010)]
    done = export(synthetic.write_run(tmp_path / "run", rows), tmp_path / "h100.json")
    assert (done.entries, done.winners, done.chosen) == (2, 2, 1)
    assert done.worst == pytest.approx(1.005)
    assert "1 configurations stand for 2 that won, the largest loss 0.50%" in exported_line(done)


def test_the_kernel_code_of_a_run_is_known_by_its_source(tmp_path):
    def code(**facts):
        run = synthetic.write_run(tmp_path / "run", timed(1024, a=0.1), synthetic.ENV | facts)
        (tmp_path / "h100.json").unlink(missing_ok=True)
        return TunedTable.load(export(run, tmp_path / "h100.json").path).runs["run"]["kernel_code"]

    assert code(kernel_code="feedfeedfeed") == "feedfeedfeed"
    assert code(kernel_source=kernel_source_hash()) == kernel_code_hash()
    assert code(kernel_source="another") is None


def test_only_our_own_configurations_are_exported():
    rows = [row(FWD, config=tile(64, 32), ms=0.2), row(FWD, "mine", tile(64, 64), ms=0.1), row(FWD, "fa4", ms=0.05)]
    assert entries(rows)["fwd", KEY].config == TileConfig(**tile(64, 32))


def test_a_case_the_heuristic_won_has_no_entry():
    rows = [row(FWD, ms=0.1, is_default=True), row(FWD, config=tile(64, 32), ms=0.2)]
    assert entries(rows) == {}
    told = [row(FWD, config=tile(64, 64), ms=0.1, is_default=True), rows[1]]
    assert entries(told)["fwd", KEY].config == TileConfig(**tile(64, 64))


def test_cases_with_sinks_go_before_those_without():
    without = case("gpt-oss", "fwd", 4096, 128, sinks=False)
    rows = [row(without, config=tile(32, 32), ms=0.05), row(FWD, config=tile(64, 32), ms=0.1)]
    assert entries(rows)["fwd", KEY].config == TileConfig(**tile(64, 32))
    assert entries(rows[:1])["fwd", KEY].config == TileConfig(**tile(32, 32))


def varlen(*lengths: int) -> Case:
    return case("gpt-oss", "fwd", max(lengths), 177, batch=len(lengths), varlen="packed", seqlens=lengths)


def test_varlen_cases_share_a_key_by_tokens_and_longest():
    long, short = varlen(2271, 4212, 1152), varlen(4100, 100)
    key = ShapeKey.packed("bfloat16", 64, 64, 64, 8, 177, 7635, 4212, 4212)
    assert shape_key(long) == shape_key(short) == key
    rows = [row(short, config=tile(32, 32), ms=0.05), row(long, config=tile(64, 32), ms=0.1)]
    assert entries(rows)["fwd", key].case == long.id        # more tokens stand for the bucket, not the shorter time


def test_interpreter_runs_are_refused_unless_told(tmp_path):
    rows = [row(FWD, config=tile(16, 32), ms=3.0, gpu="cpu")]
    run = synthetic.write_run(tmp_path / "run", rows, synthetic.ENV | {"gpu": "cpu"})
    with pytest.raises(ValueError, match="interpreter"):
        export(run, tmp_path / "cpu.json")
    assert not (tmp_path / "cpu.json").exists()
    assert TunedTable.load(export(run, tmp_path / "cpu.json", allow_interpreter=True).path).gpu == "cpu"


def test_a_run_without_winners_or_no_run_is_refused(tmp_path):
    run = synthetic.write_run(tmp_path / "run", [row(FWD, config=tile(64, 32), status="crashed")])
    with pytest.raises(ValueError, match="no timed winner"):
        export(run, tmp_path / "h100.json")
    with pytest.raises(StoreError):
        export(tmp_path / "gone", tmp_path / "h100.json")


def test_rows_of_another_card_are_left_out(tmp_path):
    rows = [row(FWD, config=tile(64, 32), ms=0.1), row(FWD, config=tile(64, 64), ms=0.01) | {"gpu": "NVIDIA H200"}]
    table = TunedTable.load(export(synthetic.write_run(tmp_path / "run", rows), tmp_path / "h100.json").path)
    assert [e.config for e in table.entries.values()] == [TileConfig(**tile(64, 32))]


def test_another_cards_table_and_a_corrupt_one_are_left_alone(tmp_path):
    run = synthetic.write_run(tmp_path / "run", [row(FWD, config=tile(64, 32), ms=0.1)])
    path = tmp_path / "h200.json"
    TunedTable.build("h200", [], {}).save(path)
    before = path.read_text()
    with pytest.raises(ValueError, match="'h200'"):
        export(run, path)
    assert path.read_text() == before
    path.write_text("{")
    with pytest.raises(TunedTableError, match="h200.json"):
        export(run, path)
    assert path.read_text() == "{"


def table(run: str, ms: float, config: dict, *, date: str = "2026-01-01", kernel: str = "fwd", source: str = "a",
          measured_as: str | None = None, key: ShapeKey = KEY, case_id: str = "c", **code: str) -> TunedTable:
    e = Entry(kernel=kernel, key=key, config=TileConfig(**config), latency_ms=ms, measured_as=measured_as or kernel,
              default_ms=None, case=case_id, run=run)
    return TunedTable.build("h100", [e], {run: {"date": date, "kernel_source": source, "triton": "3.6.0", **code}})


@pytest.mark.parametrize(("old", "new", "kept"), [
    (table("a", 0.10, tile(64, 32)), table("b", 0.20, tile(64, 64), date="2026-02-01"), "a"),     # the faster stays
    (table("a", 0.20, tile(64, 32)), table("b", 0.10, tile(64, 64), date="2025-01-01"), "b"),
    (table("a", 0.10, tile(64, 32)), table("b", 0.10, tile(64, 64)), "a"),                        # equal: the one there
    (table("a", 0.10, tile(64, 32)), table("b", 0.20, tile(64, 64), source="z", date="2026-02-01"), "b"),
    (table("a", 0.20, tile(64, 32)), table("b", 0.10, tile(64, 64), source="z", date="2025-01-01"), "a"),
    # the kernels' own code, where both runs have a hash of it: sources are others also where a launcher is
    (table("a", 0.10, tile(64, 32), kernel_code="k", hopper_kernel_code="h"),
     table("b", 0.20, tile(64, 64), source="z", date="2026-02-01", kernel_code="k", hopper_kernel_code="i"), "a"),
    (table("a", 0.10, tile(64, 32), kernel_code="k"),
     table("b", 0.20, tile(64, 64), date="2026-02-01", kernel_code="l"), "b"),
    (table("a", 0.10, tile(64, 32), kernel_code="k"),
     table("b", 0.20, tile(64, 64), source="z", date="2026-02-01"), "b"),
    (table("a", 0.10, tile(64, 32), kernel="bwd_dq"),
     table("b", 0.20, tile(64, 64), kernel="bwd_dq", measured_as="bwd"), "b"),
    (table("a", 0.20, tile(64, 32), kernel="bwd_dq", measured_as="bwd"),
     table("b", 0.10, tile(64, 64), kernel="bwd_dq"), "a"),
    (table("a", 0.10, tile(64, 32), key=KEY._replace(varlen=True)),
     table("b", 0.20, tile(64, 64), key=KEY._replace(varlen=True), case_id="d", date="2026-02-01"), "b"),
])
def test_merge_keeps_the_faster_proven_entry(old, new, kept):
    merged = merge(old, new)
    (entry,) = merged.entries.values()
    assert entry.run == kept and set(merged.runs) == {kept}


def test_an_alone_timed_part_of_newer_kernels_replaces_an_old_pair():
    old = table("a", 0.10, tile(64, 32), kernel="bwd_dq", measured_as="bwd")
    new = table("b", 0.20, tile(64, 64), kernel="bwd_dq", source="z", date="2026-02-01")
    for merged in (merge(old, new), merge(new, old)):
        assert [e.run for e in merged.entries.values()] == ["b"]


def test_what_other_kernels_had_beside_the_same_bits_goes_with_them():
    """The newer run says that the same bits are the fastest: no entry in any order stays beside them."""
    def both(run: str, date: str, source: str, *forms: int) -> TunedTable:
        entries = [Entry(kernel="hopper_bwd", key=KEY, config=HopperBwdConfig(64, 64, FORM=form), latency_ms=0.1 + form,
                         measured_as="bwd", default_ms=None, case="c", run=run) for form in forms]
        return TunedTable.build("h100", entries, {run: {"date": date, "kernel_source": source, "triton": "3.6.0"}})

    old, new = both("a", "2026-01-01", "a", 0, 1), both("b", "2026-02-01", "z", 1)
    assert len(old.entries) == 2
    assert [e.run for e in merge(old, new).entries.values()] == ["b"]
    same_kernels = both("b", "2026-02-01", "a", 1)
    assert [e.run for e in merge(old, same_kernels).entries.values()] == ["a", "a"]


def test_merge_keeps_what_only_one_table_has():
    merged = merge(table("a", 0.1, tile(64, 32)), table("b", 0.2, tile(64, 64), key=KEY._replace(window=None)))
    assert {e.run for e in merged.entries.values()} == {"a", "b"} == set(merged.runs)


def test_the_same_run_exported_again_replaces_itself():
    (entry,) = merge(table("a", 0.1, tile(64, 32)), table("a", 0.2, tile(64, 64))).entries.values()
    assert entry.latency_ms == 0.2


def test_merging_through_files(tmp_path):
    path = tmp_path / "h100.json"
    slow = [row(FWD, config=tile(64, 64), ms=0.2), row(case("gpt-oss", "fwd", 1024, 128), config=tile(64, 64), ms=0.1)]
    fast = [row(FWD, config=tile(64, 32), ms=0.1), row(case("gpt-oss", "fwd", 1024, 128), config=tile(64, 32), ms=0.3)]
    export(synthetic.write_run(tmp_path / "slow", slow), path)
    export(synthetic.write_run(tmp_path / "fast", fast), path)
    merged = TunedTable.load(path)
    assert merged.entry("fwd", KEY).run == "fast"
    assert merged.entry("fwd", KEY._replace(seqlen_q=1024, seqlen_k=1024)).run == "slow"
    assert set(json.loads(path.read_text())["runs"]) == {"slow", "fast"}


def hopper(m: int, n: int, **more) -> dict:
    return HopperBwdConfig(m, n, **more).to_dict()


def test_both_implementations_have_entries_and_the_same_bits_one_of_their_own():
    bwd = case("gpt-oss", "bwd", 4096, 128)
    rows = [row(FWD, config=tile(64, 32), ms=0.11),
            row(FWD, "hopper", HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3).to_dict(), ms=0.09),
            row(bwd, config=PAIR, ms=0.30), row(bwd, "hopper", hopper(64, 128), ms=0.20, is_default=True),
            row(bwd, "hopper", hopper(64, 64, FORM=1), ms=0.22),
            row(bwd, "hopper", hopper(64, 128, FORM=1), ms=0.25)]
    table = TunedTable.build("h100", table_entries(select(rows), "run", 0.0), {"run": {}}, arch=90)
    assert table.entry("fwd", KEY).latency_ms == 0.11
    assert table.exact("hopper_fwd", KEY) == HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3)
    assert table.entry("bwd_dq", KEY).latency_ms == 0.30
    fastest, same_bits = table.entry("hopper_bwd", KEY), table.entry("hopper_bwd", KEY, deterministic=True)
    assert (fastest.config, fastest.measured_as, fastest.default_ms) == (HopperBwdConfig(64, 128), "bwd", 0.20)
    assert (same_bits.config, same_bits.latency_ms) == (HopperBwdConfig(64, 64, FORM=1), 0.22)
    again = TunedTable.parse(json.dumps(table.to_dict()), "again.json")
    assert again.entries == table.entries and len(again.entries) == 6


def test_a_backward_that_gives_the_same_bits_and_is_the_fastest_is_one_entry():
    bwd = case("gpt-oss", "bwd", 4096, 128)
    rows = [row(bwd, "hopper", hopper(64, 128), ms=0.25), row(bwd, "hopper", hopper(64, 64, FORM=1), ms=0.22)]
    (entry,) = table_entries(select(rows), "run")
    assert entry.config == HopperBwdConfig(64, 64, FORM=1) and entry.kernel == "hopper_bwd"
