"""report.html as a file: what it holds, and that it needs nothing from outside. tests/test_browser.py opens it."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sweeps import html_report
from sweeps.beside import read_runs, write_beside
from sweeps.chart_data import curve_panels, heat_panels, roofline_points, speedup_charts, stage_values
from sweeps.cli import app
from sweeps.html_report import case_table
from sweeps.report import write_report
from sweeps.select import select
from sweeps.sittings import sitting_lines
from sweeps.tables import failure_groups
from sweeps.trial_table import trial_table
from tests import synthetic
from tests.synthetic import case, row, tile

pytest.importorskip("altair")
pytest.importorskip("itables")
pytest.importorskip("vl_convert")

SITTING = {"start": "2026-01-02T03:04:05+00:00", "elapsed_s": 61.4, "new_rows": 30, "new_finals": 4, "gpu_busy": 0.62,
           "cached_share": 0.0, "stopped": "", "seconds": {"prepare": 20.0, "measure": 30.0, "idle": 0.0}}


class Page(HTMLParser):
    """Elements with data attributes, links, and the page's data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.winners: dict[str, str] = {}
        self.cases: dict[str, dict[str, str]] = {}
        self.outside: list[str] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {k: v or "" for k, v in attrs}
        if "data-winners" in found:
            self.winners |= json.loads(found["data-winners"])
        if tag == "tr" and "data-case" in found:
            self.cases[found["data-case"]] = found
        self.outside += [found[k] for k in ("src", "href") if k in found and not found[k].startswith(("#", "data:"))]
        self._in_data = found.get("id") == "report-data"

    def handle_data(self, data):
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag):
        self._in_data = False


@pytest.fixture(scope="module")
def rows():
    return synthetic.run_rows(small=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, rows):
    path = synthetic.write_run(tmp_path_factory.mktemp("runs") / "20260102T030405Z-h100", rows)
    (path / "summary.json").write_text(json.dumps([SITTING]))
    assert write_report(path) == ""
    return path


@pytest.fixture(scope="module")
def page(run_dir):
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_one_small_file_that_names_nothing_outside(run_dir, page):
    assert 1e6 < (run_dir / "report.html").stat().st_size < 8e6
    assert page.outside == []
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!\"?data:|'data:)", re.sub(r"<script.*?</script>", "", text, flags=re.S))


def test_the_winners_on_top_are_those_of_best_csv(run_dir, page):
    with (run_dir / "best.csv").open() as f:
        best = {r["case"]: r for r in csv.DictReader(f)}
    whole = {c for c, r in best.items() if r["pass"] in ("fwd", "bwd") and r["status"] != "not_run"}
    assert set(page.winners) == whole
    assert {c: w or "" for c, w in page.winners.items()} == {c: best[c]["config"] for c in whole}
    tried = {c for c, r in best.items() if r["status"] != "not_run"}
    assert set(page.cases) == tried
    assert {c: (r["data-config"], r["data-impl"]) for c, r in page.cases.items()} == {
        c: (best[c]["config"], best[c]["impl"]) for c in tried}


def test_the_pages_data_is_whole(page, rows):
    data = json.loads(page.data)
    assert len(data["trials"]["rows"]) == len(rows)
    assert {c["spec"] for c in data["charts"].values()} <= {s.removesuffix("-ms").removesuffix("-tflops")
                                                            for s in data["specs"]}
    assert {i["name"] for i in data["looks"]} == {"triton", *synthetic.PEERS}
    assert len({(i["colour"], i["path"]) for i in data["looks"]}) == len(data["looks"])
    assert len({i["path"] for i in data["looks"]}) == len(data["looks"])      # a shape of its own, without colour
    assert not next(i for i in data["looks"] if i["name"] == "sdpa_flash")["sink"] and data["hidden"] == ["eager"]


def test_text_of_a_row_cannot_end_the_script_or_become_markup(tmp_path):
    bad = "</script><b>&'\"<!--"
    rows = [row(case("gpt-oss", "fwd", 1024), config=tile(64, 32), ms=0.1),
            row(case("gpt-oss", "fwd", 1024), config=tile(64, 64), status="crashed", message=bad)]
    run = synthetic.write_run(tmp_path / "run", rows)
    write_report(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert bad not in text and "&lt;/script&gt;&lt;b&gt;" in text
    data = json.loads(Page(text).data)
    assert any(bad in str(r[-1]) for r in data["trials"]["rows"])


def test_without_the_packages_a_run_still_ends_well(run_dir, monkeypatch, tmp_path, rows):
    run = synthetic.write_run(tmp_path / "run", rows[:40])
    (run / "report.html").write_text("of an earlier report")
    monkeypatch.setattr(html_report, "NEEDS", ("altair", "no_such_package"))
    said = write_report(run)
    assert "needs no-such-package" in said and f"python -m sweeps report {run}" in said
    assert not (run / "report.html").exists() and (run / "report.md").is_file() and (run / "best.csv").is_file()
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0 and "no-such-package" in done.output and "report.md, tables" in done.output


def test_curves_hold_every_time_and_its_interval(rows):
    selection = select(rows)
    charts = {c.title: c for p in curve_panels(selection) for c in p.charts}
    assert set(charts) == {"fwd, causal", "bwd, causal", "fwd, window 128", "bwd, window 128"}
    best = selection.get(case("gpt-oss", "fwd", 1024, 128).id).best
    (value,) = [v for v in charts["fwd, window 128"].values if v["impl"] == "triton" and v["n"] == 1024]
    assert (value["ms"], value["low"], value["high"]) == (best.latency_ms, best.low, best.high)
    assert value["tflops"] == pytest.approx(best.row["tflops"]) and value["config"] == "64x32 w4 s3"
    assert value["tlow"] < value["tflops"] < value["thigh"]


def test_heat_maps_mark_one_best_and_say_why_a_cell_is_empty(rows):
    panels = {p.title: p for p in heat_panels(select(rows))}
    for chart in panels["gpt-oss (64/8 x 64), bf16, window 128"].charts:
        assert sum(v["best"] for v in chart.values) == 1 == sum(v["ratio"] == 1 for v in chart.values)
    (dead,) = panels["gpt-oss (64/8 x 64), bf16, window 16"].charts
    assert {v["text"] for v in dead.values} == {"crashed", "runtime error"}


def test_speedups_rooflines_and_stages(rows):
    selection = select(rows)
    charts = {c.id: c for c in speedup_charts(selection)}
    assert set(charts) == {"speedup-eager", "speedup-flash", "speedup-default"}
    assert all((v["speedup"] >= 1) == (v["who"] == "ours is faster") for c in charts.values() for v in c.values)
    points = roofline_points(selection)
    assert len([p for p in points if p["who"] == "ours"]) == 8
    timed = [r | {"seconds": {"run": 1.0, "measure": 3.0}} for r in rows[:4]]
    found = {v["stage"]: v for v in stage_values(timed)}
    assert found["measure"]["seconds"] == 12.0 and found["measure"]["text"] == "12.0 s, 75.0% of triton"


def test_the_trial_table_has_a_row_per_trial_best_first(rows):
    table = trial_table([("run", rows)])
    titles = [c["title"] for c in table["columns"]]
    assert len(table["rows"]) == len(rows) and all(len(r) == len(titles) for r in table["rows"])
    first = [dict(zip(titles, r, strict=True)) for r in table["rows"]
             if r[2] == "fwd" and r[4] == "causal" and r[6] == 1024]
    times = [r["ms"] for r in first if r["status"] == "ok"]
    assert times == sorted(times) and [r["status"] for r in first][:len(times)] == ["ok"] * len(times)
    assert [c["title"] for c in trial_table([("a", rows), ("b", rows)])["columns"]][0] == "run"


def test_columns_of_finals_are_shown_where_a_run_has_them(monkeypatch, rows):
    selection = select(rows)
    plain = [c["title"] for c in case_table(selection)["columns"]]
    assert "energy, J" not in plain
    whole = html_report.best_row
    monkeypatch.setattr(html_report, "best_row", lambda r: whole(r) | {"energy_j": 0.01234, "wall_disagrees": True})
    table = case_table(selection)
    at = [c["title"] for c in table["columns"]].index("energy, J")
    assert table["rows"][0]["cells"][at] == "0.0123"
    assert table["rows"][0]["cells"][-1] == "another" and all(
        len(r["cells"]) == len(table["columns"]) for r in table["rows"])


def test_sittings_are_told(run_dir):
    assert sitting_lines([]) == []
    (line,) = sitting_lines([SITTING])
    assert line == ("The run took 61 s for 30 trials and 4 finals, the GPU busy 62% of it, nothing built before "
                    "(cold). The workers' seconds: measure 30, prepare 20.")
    assert sitting_lines([SITTING, SITTING | {"stopped": "interrupted"}])[1].startswith("Sitting 2 of 2: 61 s")
    assert line in (run_dir / "report.md").read_text() and line.replace("'", "&#39;") in (
        run_dir / "report.html").read_text()


def test_failures_are_counted_once(rows):
    groups = failure_groups(select(rows))
    assert sum(g.count for g in groups) == sum(r["status"] != "ok" for r in rows)
    assert [g.harmless for g in groups] == sorted(g.harmless for g in groups)


def test_runs_of_two_cards_stand_side_by_side(tmp_path, rows):
    h100 = synthetic.write_run(tmp_path / "h100" / "a", rows)
    faster = [r | {"gpu": "NVIDIA H200"} | ({"latency_ms": r["latency_ms"] / 2,
                                            "samples_ms": [s / 2 for s in r["samples_ms"]]} if r.get("samples_ms")
                                           else {}) for r in rows]
    h200 = synthetic.write_run(tmp_path / "h200" / "a", faster, synthetic.ENV | {"gpu": "NVIDIA H200", "driver": "9"})
    assert [r.name for r in read_runs([h100, h200])] == ["h100/a", "h200/a"]
    done = CliRunner().invoke(app, ["report", str(h100), str(h200)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "beside.html").read_text(encoding="utf-8")
    data = json.loads(Page(text).data)
    assert {i["name"] for i in data["looks"]} == {"h100/a", "h200/a"}
    assert len(data["trials"]["rows"]) == 2 * len(rows) and len(text) < 8e6
    md = (tmp_path / "beside.md").read_text()
    assert "| geometric mean |" in md and md.count("2.00x") >= 17 and "NVIDIA H200" in md
    assert (h100 / "report.html").is_file() and (h200 / "report.html").is_file()
    with pytest.raises(ValueError, match="two runs or more, got 1"):
        write_beside([h100], tmp_path / "one.html")


def test_an_option_for_several_runs_is_refused_for_one(run_dir, tmp_path):
    done = CliRunner().invoke(app, ["report", str(run_dir), "--beside", str(tmp_path / "x.html")])
    assert done.exit_code == 2 and "expected two runs or more" in done.output
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 1


def test_the_templates_are_shipped():
    names = {p.name for p in (Path(html_report.__file__).parent / "templates").iterdir()}
    assert names == {"base.html.j2", "beside.html.j2", "macros.html.j2", "report.html.j2", "script.js", "style.css"}
