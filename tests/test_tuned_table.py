"""The tuned table: keys, exact lookups, the file and its errors."""

from __future__ import annotations

import copy
import json
import logging

import pytest

from flash_sink_attn import tuned_table
from flash_sink_attn.config import TileConfig
from flash_sink_attn.tuned_table import ENV_VAR, Entry, ShapeKey, TunedTable, TunedTableError, load_table

KEY = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, 128, 1, 8192, 8192)
CAUSAL = KEY._replace(window=None)
TILE = TileConfig(64, 32, 4, 3, PACK_GQA=True, maxnreg=96)
RUNS = {"run-a": {"date": "2026-01-02", "triton": "3.6.0", "kernel_source": "aaaa"}}


def entry(kernel="fwd", key=KEY, config=TILE, **more):
    fields = {"latency_ms": 0.1, "measured_as": "fwd" if kernel == "fwd" else "bwd", "default_ms": 0.2, "case": "c",
              "run": "run-a"}
    return Entry(kernel=kernel, key=key, config=config, **(fields | more))


@pytest.fixture
def table():
    return TunedTable.build("h100", [entry(), entry(key=CAUSAL, config=TileConfig(64, 64)), entry("bwd_dq")], RUNS)


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch):
    monkeypatch.delenv(ENV_VAR, raising=False)
    tuned_table.forget_tables()
    yield
    tuned_table.forget_tables()


def test_exact_means_every_field(table):
    assert table.exact("fwd", KEY) == TILE
    assert table.exact("fwd", ShapeKey("bfloat16", 64, 64, 64, 8, 128, 1, 8192, 8192, False)) == TILE
    assert table.exact("fwd", CAUSAL) == TileConfig(64, 64)
    assert table.exact("bwd_dkdv", KEY) is None
    for field, other in (("dtype", "float16"), ("head_dim", 128), ("head_dim_v", 128), ("heads_q", 32), ("heads_kv", 4),
                         ("window", 127), ("batch", 2), ("seqlen_q", 8191), ("seqlen_k", 8191), ("varlen", True)):
        assert table.exact("fwd", KEY._replace(**{field: other})) is None, field
    assert table.entry("fwd", KEY).default_ms == 0.2 and table.entry("fwd", KEY._replace(batch=3)) is None


@pytest.mark.parametrize(("lengths", "batch", "seqlen"), [
    ([2271, 4212, 1152], 1, 8192),       # 7635 tokens
    ([4096], 1, 4096), ([4096, 4096], 2, 4096), ([4096, 1], 2, 4096), ([1024] * 8, 8, 1024), ([5], 1, 8),
    ([1], 1, 1), ([100] * 3, 4, 128)])
def test_packed_keys_round_to_powers_of_two(lengths, batch, seqlen):
    key = ShapeKey.packed("bfloat16", 64, 64, 64, 8, None, sum(lengths), max(lengths), max(lengths))
    assert (key.batch, key.seqlen_q, key.seqlen_k, key.varlen) == (batch, seqlen, seqlen, True)
    assert key != ShapeKey.fixed("bfloat16", 64, 64, 64, 8, None, batch, seqlen, seqlen)


def test_packed_keys_meet_again_for_a_similar_batch():
    def key(*lengths):
        return ShapeKey.packed("float16", 128, 128, 28, 4, 177, sum(lengths), max(lengths), max(lengths))

    assert key(2271, 4212, 1152) == key(4200, 3000)
    assert key(2271, 4212, 1152) != key(2271, 4000, 1152)       # the longest is in another bucket
    empty = ShapeKey.packed("float16", 128, 128, 28, 4, None, 0, 0, 0)
    assert (empty.batch, empty.seqlen_q) == (1, 1)


def test_file_round_trip(table, tmp_path):
    path = tmp_path / "tuned" / "h100.json"
    table.save(path)
    again = TunedTable.load(path)
    assert again.entries == table.entries and again.runs == RUNS and again.gpu == "h100"
    assert [p.name for p in path.parent.iterdir()] == ["h100.json"]
    text = path.read_text()
    again.save(path)
    assert path.read_text() == text
    lines = [line for line in text.splitlines() if "BLOCK_M" in line]
    kinds = [('"kernel": "fwd"' in x, '"window": null' in x) for x in lines]
    assert kinds == [(False, False), (True, True), (True, False)]        # an entry a line, in a stable order
    TunedTable.build("h100", [], {}).save(path)
    assert TunedTable.load(path).entries == {}


def test_a_table_of_the_first_schema_is_still_read(table, tmp_path):
    document = table.to_dict() | {"schema_version": 1}
    del document["arch"]
    for e in document["entries"]:
        del e["best_ms"]
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(document))
    again = TunedTable.load(path)
    assert again.entries == table.entries and again.arch is None
    assert {e.best_ms for e in again.entries.values()} == {None}


def test_the_architecture_and_the_best_time_are_kept(tmp_path):
    path = tmp_path / "h100.json"
    TunedTable.build("h100", [entry(best_ms=0.099)], RUNS, arch=90).save(path)
    again = TunedTable.load(path)
    assert again.arch == 90 and again.entry("fwd", KEY).best_ms == 0.099
    assert [e.key for e in again.of_kernel("fwd")] == [KEY] and again.of_kernel("bwd_dq") == ()


def test_tables_of_other_cards_are_those_of_the_same_architecture(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    TunedTable.build("h800", [entry()], RUNS, arch=90).save(path)
    monkeypatch.setenv(ENV_VAR, str(path))
    assert tuned_table.load_others("a-card", 90)[0].gpu == "h800"
    assert "h800" not in [t.gpu for t in tuned_table.load_others("h800", 90)]
    assert "h800" not in [t.gpu for t in tuned_table.load_others("a-card", 100)]
    TunedTable.build("h800", [entry()], RUNS).save(path)
    tuned_table.forget_tables()
    assert "h800" not in [t.gpu for t in tuned_table.load_others("a-card", 90)]     # it does not say which it is for


def test_only_runs_that_an_entry_names_are_kept():
    assert TunedTable.build("h100", [entry()], RUNS | {"old": {}}).runs == RUNS


@pytest.mark.parametrize(("change", "field"), [
    (lambda d: d.pop("schema_version"), "schema_version: missing"),
    (lambda d: d.update(schema_version=4), "schema_version: expected 1 or 2 or 3, got 4"),
    (lambda d: d.update(arch="sm_90"), "arch: expected int or null, got 'sm_90'"),
    (lambda d: d.update(arch=0), " arch: expected a positive number, got 0"),
    (lambda d: d["entries"][0].update(best_ms=0), "entries[0].best_ms: expected a positive number, got 0"),
    (lambda d: d.update(gpu=7), "gpu: expected str, got 7"),
    (lambda d: d.update(entries={}), "entries: expected list"),
    (lambda d: d["entries"][1].pop("config"), "entries[1].config: missing"),
    (lambda d: d["entries"].__setitem__(0, []), "entries[0]: expected an object"),
    (lambda d: d["entries"][0].update(kernel="bwd"), "entries[0].kernel: expected one of"),
    (lambda d: d["entries"][0].update(run="gone"), "entries[0].run: expected one of the names under runs, got 'gone'"),
    (lambda d: d["entries"][0].update(latency_ms=-1), "entries[0].latency_ms: expected a positive number, got -1"),
    (lambda d: d["entries"][0].update(measured_as="fwd_bwd"), "entries[0].measured_as: expected one of"),
    (lambda d: d["entries"][0]["config"].update(BLOCK_M="64"), "entries[0].config.BLOCK_M: expected int, got '64'"),
    (lambda d: d["entries"][0]["config"].update(BLOCK_M=48), "entries[0].config.BLOCK_M: expected one of"),
    (lambda d: d["entries"][0]["config"].update(PACK_GQA=1), "entries[0].config.PACK_GQA: expected bool, got 1"),
    (lambda d: d["entries"][0]["config"].update(warps=4), "entries[0].config: config: unknown field 'warps'"),
    (lambda d: d["entries"][0]["config"].update(num_stages=0), "entries[0].config.num_stages: expected a positive"),
    (lambda d: d["entries"][0]["key"].update(window=0), "entries[0].key.window: expected a positive number, got 0"),
    (lambda d: d["entries"][0]["key"].update(batch=True), "entries[0].key.batch: expected int, got True"),
    (lambda d: d["entries"][0]["key"].update(dtype="float32"), "entries[0].key.dtype: expected one of"),
    (lambda d: d["entries"][0]["key"].update(seqlen=1), "entries[0].key.seqlen: unknown"),
])
def test_a_corrupt_table_names_file_and_field(table, tmp_path, change, field):
    document = copy.deepcopy(json.loads(json.dumps(table.to_dict())))
    change(document)
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TunedTableError) as e:
        TunedTable.load(path)
    assert str(path) in str(e.value) and field in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "h100.json"
    path.write_text(text)
    with pytest.raises(TunedTableError, match="h100.json"):
        TunedTable.load(path)


def test_packaged_tables_are_readable():
    assert load_table("no-such-card") is None
    for path in (tuned_table.Path(tuned_table.__file__).parent / "tuned").glob("*.json"):
        assert load_table(path.stem).gpu == path.stem


def test_users_file_stands_in_for_the_packaged_one(table, tmp_path, monkeypatch, caplog):
    path = tmp_path / "mine.json"
    table.save(path)
    monkeypatch.setenv(ENV_VAR, str(path))
    assert load_table("h100").exact("fwd", KEY) == TILE
    assert load_table("h100") is load_table("h100")
    with caplog.at_level(logging.WARNING, logger="flash_sink_attn"):
        assert load_table("no-such-card") is None
        assert load_table("no-such-card") is None
    assert len(caplog.records) == 1 and "'h100'" in caplog.text and "'no-such-card'" in caplog.text


def test_users_file_that_is_absent_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(ENV_VAR, str(tmp_path / "gone.json"))
    with pytest.raises(TunedTableError, match=rf"gone\.json.*{ENV_VAR}"):
        load_table("h100")
