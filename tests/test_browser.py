"""report.html in a real browser, without a network: nothing logged, the answer is best.csv's, filters and sorting."""

from __future__ import annotations

import csv
import json
import os
import shutil

import pytest

from sweeps.beside import write_beside
from sweeps.report import write_report
from tests import synthetic

for needed in ("altair", "itables", "vl_convert"):
    pytest.importorskip(needed)
playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("CHROMIUM") or next((p for name in BROWSERS if (p := shutil.which(name))), None)
if BROWSER is None:
    pytest.skip(f"no Chromium: none of {', '.join(BROWSERS)} is on PATH, and CHROMIUM names none",
                allow_module_level=True)


@pytest.fixture(scope="module")
def rows():
    return synthetic.run_rows(small=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, rows):
    timed = [r | {"seconds": {"prepare": 0.5, "measure": 0.2}} for r in rows]
    path = synthetic.write_run(tmp_path_factory.mktemp("runs") / "20260102T030405Z-h100", timed)
    assert write_report(path) == ""
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Opens a file without a network; at the end nothing may have been logged or asked for."""
    said: list[str] = []
    contexts = []

    def opened(path, **options):
        options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"} | options
        context = browser.new_context(offline=True, accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: said.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: said.append(f"error: {e}"))
        page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
        page.goto(f"file://{path}")
        page.wait_for_function("window.sweepReport")
        page.evaluate("sweepReport.table.then(() => true)")
        page.evaluate("sweepReport.drawAll().then(() => true)")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def shown(page) -> list[list[str]]:
    return page.evaluate("[...document.querySelectorAll('#trial-table tbody tr')]"
                         ".map(r => [...r.cells].map(c => c.textContent))")


def titles(page) -> list[str]:
    return page.evaluate("JSON.parse(document.getElementById('report-data').textContent).trials.columns"
                         ".map(c => c.title)")


def matching(page) -> int:
    return page.evaluate("sweepReport.table.then(t => t.rows({search: 'applied'}).count())")


def test_the_winner_named_on_top_is_best_csvs(open_page, run_dir):
    page = open_page(run_dir / "report.html")
    top = page.evaluate("[...document.querySelectorAll('table.answer .winner')]"
                        ".map(w => [w.dataset.winners, [...w.querySelectorAll('code')].map(c => c.textContent)])")
    with (run_dir / "best.csv").open() as f:
        best = {r["case"]: r for r in csv.DictReader(f)}
    named = {}
    for data, said in top:
        for case_id, config in json.loads(data).items():
            named[case_id] = config
            if config:
                tile = json.loads(config)
                parts = [tile] if "BLOCK_M" in tile else [tile["bwd_dq"], tile["bwd_dkdv"]]
                assert len(said) == len(parts)
                assert all(f"{t['BLOCK_M']}x{t['BLOCK_N']} w{t['num_warps']} s{t['num_stages']}" in s
                           for t, s in zip(parts, said, strict=True))
    whole = {c: r["config"] or None for c, r in best.items()
             if r["pass"] in ("fwd", "bwd") and r["status"] != "not_run"}
    assert named == whole
    assert page.locator("section").first.get_attribute("id") == "answer"


def test_every_chart_is_drawn_and_can_be_saved(open_page, run_dir):
    page = open_page(run_dir / "report.html")
    visible = page.evaluate("[...document.querySelectorAll('figure.chart')].filter(f => f.offsetParent)"
                            ".map(f => f.querySelectorAll('svg.marks').length)")
    assert len(visible) >= 4 + 6 + 1 + 1 + 1 and set(visible) == {1}
    figure = page.locator("figure.chart").first
    figure.locator("summary").click()
    for name in ("SVG", "PNG"):
        with page.expect_download() as download:
            figure.get_by_text(f"Save as {name}").click()
        assert download.value.suggested_filename == f"curve-0.{name.lower()}"
        page.evaluate("document.querySelector('figure.chart details').open = true")


def test_hovering_shows_the_configuration_and_its_interval(open_page, run_dir):
    page = open_page(run_dir / "report.html")
    points = page.locator("figure[data-chart=curve-0] svg .mark-symbol path[aria-label*='impl: triton']")
    points.first.scroll_into_view_if_needed()
    points.first.hover(force=True)
    tip = page.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    assert "64x64 w4 s3" in tip.inner_text() and "95% interval" in tip.inner_text() and "±0.2%" in tip.inner_text()


def test_lines_hide_and_metrics_change(open_page, run_dir):
    page = open_page(run_dir / "report.html")

    def points(name):
        return page.locator(f"figure[data-chart=curve-0] svg .mark-symbol path[aria-label*='{name};']").count()

    assert points("fa3") == 2 and points("eager") == 0
    page.click(".legend button[value=fa3]")
    page.click(".legend button[value=eager]")
    page.wait_for_function("document.querySelector(\"figure[data-chart=curve-0] path[aria-label*='eager;']\")")
    assert points("fa3") == 0 and points("eager") == 2
    page.click("button[value=tflops]")
    page.wait_for_function("document.querySelector('figure[data-chart=curve-0]').textContent.includes('TFLOP/s')")
    assert points("fa3") == 0 and points("eager") == 2


def test_the_table_sorts_searches_and_filters(open_page, run_dir, rows):
    page = open_page(run_dir / "report.html")
    columns = titles(page)
    assert matching(page) == len(rows) and len(shown(page)) == 25
    ms = columns.index("ms")

    def heading(column):
        return page.locator(f"#trials .dt-scroll-head thead [data-dt-column='{column}']")

    order = heading(ms).locator(".dtcc-button_order")
    times = [float(f"{r['latency_ms']:.4g}") for r in rows if r.get("latency_ms")]

    def first_is(value):        # the table is drawn again a moment after a click
        page.wait_for_function(
            "([column, value]) => Number(document.querySelector('#trial-table tbody tr').cells[column].textContent)"
            " === value", arg=[ms, value])

    order.click()
    first_is(min(times))
    up = [float(r[ms]) for r in shown(page) if r[ms]]
    assert up == sorted(up) and len(up) == 25
    order.click()
    first_is(max(times))
    down = [float(r[ms]) for r in shown(page) if r[ms]]
    assert down == sorted(down, reverse=True) and len(down) == 25
    page.fill("#trials input[type=search]", "no backward with a sink")
    wanted = sum("no backward with a sink" in r["message"] for r in rows)
    page.wait_for_function("n => sweepReport.table.then(t => t.rows({search: 'applied'}).count() === n)", arg=wanted)
    assert matching(page) == wanted > 0
    page.fill("#trials input[type=search]", "")
    impl = columns.index("impl")
    heading(impl).locator(".dtcc-button_dropdown").click()
    page.locator(".dtcc-list .dtcc-button", has_text="fa3").click()
    wanted = sum(r["impl"] == "fa3" for r in rows)
    page.wait_for_function("n => sweepReport.table.then(t => t.rows({search: 'applied'}).count() === n)", arg=wanted)
    assert matching(page) == wanted > 0
    assert {r[impl] for r in shown(page)} == {"fa3"}


def test_the_heat_maps_follow_the_choice(open_page, run_dir):
    page = open_page(run_dir / "report.html")
    select = page.locator("select[data-show=tiles]")
    for value, label in enumerate(select.locator("option").all_inner_texts()):
        select.select_option(f"tiles-{value}")
        page.evaluate("sweepReport.drawAll().then(() => true)")
        grid = page.locator(f"#show-tiles-{value}")
        assert grid.is_visible() and page.locator("[data-shown=tiles]:visible").count() == 1, label
        assert grid.locator("svg.marks").count() == grid.locator("figure").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_the_theme_is_the_readers(open_page, run_dir, scheme, width):
    page = open_page(run_dir / "report.html", viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    chart = "document.querySelector('figure.chart svg.marks').style.backgroundColor"
    before = page.evaluate(chart)
    page.click("#theme")
    page.wait_for_function(f"{chart} !== {json.dumps(before)}")
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") != light


def test_runs_side_by_side_open_too(open_page, run_dir, tmp_path):
    write_beside([run_dir, run_dir], tmp_path / "beside.html")
    page = open_page(tmp_path / "beside.html")
    assert page.locator("svg.marks").count() == page.locator("figure.chart").count() == 4
    assert page.locator(".legend button").all_inner_texts() == [
        "20260102T030405Z-h100 #1", "20260102T030405Z-h100 #2"]
