"""The report of a made-up run: its tables' text, its figures' contents, its files."""

from __future__ import annotations

import ast
import csv
import json
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.patches import Rectangle

import sweeps
from flash_sink_attn.config import HopperBwdConfig
from sweeps import tables
from sweeps.board import board_markdown, boards, summary_line
from sweeps.columns import COLUMNS
from sweeps.heatmaps import heatmap_figures, tile_cells
from sweeps.plots import curve_figures, roofline_figures, speedup_figures
from sweeps.report import INTERPRETER_WARNING, headline, write_report
from sweeps.select import Measured, select
from sweeps.store import Store, StoreError
from tests import synthetic
from tests.synthetic import case, row, tile

FWD = case("gpt-oss", "fwd", 4096, 128)


@pytest.fixture(scope="module")
def rows():
    return synthetic.run_rows(small=True)


@pytest.fixture(scope="module")
def selection(rows):
    return select(rows)


@pytest.fixture(scope="module")
def full():
    return select(synthetic.run_rows())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, rows):
    path = synthetic.write_run(tmp_path_factory.mktemp("runs") / "20260102T030405Z-h100", rows)
    write_report(path)
    return path


def cells(line: str) -> list[str]:
    return [c.strip() for c in line.replace("\\|", "\0").strip("| ").split("|")]


def table_rows(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:]]


# Tables


def test_numbers_keep_their_significant_digits():
    numbers = [0.10812, 1.923, 76.56, 1234.6, 0, None]
    assert [tables.number(x) for x in numbers] == ["0.108", "1.92", "76.6", "1235", "0", "-"]
    assert tables.number(0.9999) == "1.00" and tables.number(0.02103, 4) == "0.02103"
    assert tables.geometric_mean([2.0, 8.0]) == pytest.approx(4) and tables.geometric_mean([]) is None


def test_markdown_escapes_what_would_break_a_table():
    assert tables.markdown(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n|---|---:|\n| x\\|y | 1 2 |"


def test_best_table_has_a_row_per_case_of_ours(selection):
    found = table_rows(tables.best_table(selection))
    assert len(found) == sum(bool(r.own_rows) for r in selection.results)
    r = selection.get(case("gpt-oss", "fwd", 2048, 128).id)
    line = next(x for x in found if (x["pass"], x["mask"], x["length"]) == ("fwd", "window 128", "2048"))
    assert line["best config"] == r.best.label == "64x32 w4 s3"
    assert line["ms"].startswith(tables.number(r.best.latency_ms, 4)) and "±0.2%" in line["ms"]
    assert line["vs eager"] == f"{tables.number(r.eager.latency_ms / r.best.latency_ms)}x"
    assert line["best peer, ms"] == f"fa3 {tables.number(r.peers['fa3'].latency_ms, 4)}"
    assert any(x["best config"] == "no candidate was ok" for x in found)


def test_answer_table_joins_the_lengths_of_a_family():
    shapes = {s: case("gpt-oss", "fwd", s) for s in (1024, 2048, 4096)}
    rows = [row(c, config=tile(64, 64 if s < 4096 else 32), ms=s / 1e4, samples=9) for s, c in shapes.items()]
    rows += [row(c, "eager", ms=s / 1e4 * f) for (s, c), f in zip(shapes.items(), (2, 4, 8), strict=True)]
    (line,) = table_rows(tables.answer_table(select(rows)))
    assert line["length"] == "1024-4096"
    assert line["best block sizes"] == "64x64 w4 s3 (1024-2048); 64x32 w4 s3 (4096)"
    assert line["vs eager"] == "4.00x" and line["vs flash"] == "-" and line["clear winners"] == "3 of 3"


def test_answer_table_shows_a_backwards_parts_only_without_the_whole():
    parts = [row(case("gpt-oss", p, 1024), config=tile(64, 64), ms=0.1) for p in ("bwd_dq", "bwd_dkdv")]
    assert [x["pass"] for x in table_rows(tables.answer_table(select(parts)))] == ["bwd_dq", "bwd_dkdv"]
    whole = row(case("gpt-oss", "bwd", 1024), config={"bwd_dq": tile(64, 64), "bwd_dkdv": tile(32, 64)}, ms=0.2)
    assert [x["pass"] for x in table_rows(tables.answer_table(select([*parts, whole])))] == ["bwd"]


def test_implementation_tables_mark_the_best_and_say_why_a_time_is_missing(selection):
    text = tables.implementation_tables(selection, "latency_ms")
    assert text.startswith("**gpt-oss (64/8 x 64), bf16**")
    found = {(x["pass"], x["mask"], x["length"]): x for x in table_rows(text)}
    r = selection.get(case("gpt-oss", "fwd", 1024, 128).id)
    line = found["fwd", "window 128", "1024"]
    assert line["triton"] == f"**{tables.number(r.best.latency_ms, 4)}**"
    assert line["fa3"] == tables.number(r.peers["fa3"].latency_ms, 4)
    assert line["sdpa_flash"] == "-" and found["bwd", "causal", "1024"]["upstream"] == "incorrect"
    assert found["fwd", "window 16", "64"]["triton"] == "failed"
    assert "fa2" not in line and not any(p.startswith("bwd_") for p, *_ in found)
    rates = table_rows(tables.implementation_tables(selection, "tflops"))
    rate = {(x["pass"], x["mask"], x["length"]): x for x in rates}
    assert rate["fwd", "window 128", "1024"]["triton"] == f"**{tables.number(r.best.row['tflops'], 4)}**"


def test_failures_are_grouped_by_status_and_kind(selection, rows):
    found = table_rows(tables.failure_table(selection))
    assert sum(int(x["trials"]) for x in found) == sum(r["status"] != "ok" for r in rows)
    crashed = next(x for x in found if x["status"] == "crashed")
    assert (crashed["trials"], crashed["implementation"], crashed["pass"]) == ("2", "triton", "fwd")
    incorrect = [x for x in found if x["status"] == "incorrect"]
    assert {x["implementation"] for x in incorrect} == {"triton", "upstream"}
    assert [x["status"] for x in found][-1] == "unsupported"       # what went wrong stands before what cannot run
    two = select([row(FWD, config=tile(64, n), status="oom", message=f"tried {n} MiB") for n in (32, 64)])
    assert len(table_rows(tables.failure_table(two))) == 1
    assert tables.failure_table(select([row(FWD, ms=1.0)])) == "Every trial was ok."


def test_workload_board_puts_ours_beside_every_peer(full):
    text = tables.workload_board(full)
    found = {(x["workload"], x["pass"]): x for x in table_rows(text)}
    assert len(found) == 8
    r = full.get(case("gpt-oss", "fwd", 8192, 128).id)
    line = found["gpt-oss, window 128", "fwd"]
    assert line["triton"] == f"**{tables.number(r.best.latency_ms, 4)}**" and line["our config"] == "64x32 w4 s3"
    assert line["best peer / ours"] == f"{tables.number(r.best_peer.latency_ms / r.best.latency_ms)}x"
    assert found["Llama-70B, causal", "fwd"]["sdpa_cudnn"].endswith("*") and "without the sink" in text
    assert tables.workload_board(select([row(FWD, ms=1.0)])) == ""


def test_a_board_has_a_ratio_per_case_their_mean_and_the_worst():
    window, causal, alone = FWD, case("gpt-oss", "fwd", 2048, None), case("gpt-oss", "fwd", 4096, None, batch=2)
    lost = case("gpt-oss", "fwd", 4096, 4096)
    found = boards(select([
        row(window, "hopper", tile(64, 64), ms=0.5), row(window, "fa3", ms=1.0),
        row(window, "sdpa_cudnn", ms=0.1, applies_sink=False), row(causal, "cudnn_deterministic", ms=0.6),
        row(causal, config=tile(64, 64), ms=1.0), row(causal, "fa4", ms=0.5),
        row(alone, config=tile(64, 64), ms=1.0), row(lost, "hopper", tile(64, 64), "incorrect"),
        row(lost, "fa3", ms=1.0), row(case("gpt-oss", "bwd_dq", 1024, 128), config=tile(64, 64), ms=1.0)]))
    (board,) = found
    assert board.mean == pytest.approx(1.0) and board.worst is not None and board.worst[0] == pytest.approx(0.5)
    text = board_markdown(board)
    lines = {x["fwd"]: x for x in table_rows(text)}
    assert len(lines) == 4 and [x["best peer / ours"] for x in lines.values()].count("-") == 2
    assert next(x for name, x in lines.items() if "2 x 4096" in name)["triton"] == "**1.000**"
    assert "ahead of the fastest peer in 1 of 2; best peer / ours 1.00x in the geometric mean, 0.500x in the" in text
    assert "gpt-oss (64/8 x 64), causal, bf16, 2048); 1 without a peer; 1 without a time of ours." in text
    assert "without the sink" in text and boards(select([])) == []
    assert "no case has a time" in summary_line(boards(select([row(FWD, ms=1.0)]))[0])


def test_a_board_says_what_the_same_bits_each_time_cost():
    causal, wide = case("gpt-oss", "bwd", 2048, None), case("gpt-oss", "bwd", 4096, None)
    loose, ordered, again = (HopperBwdConfig(64, n, **other).to_dict()
                             for n, other in ((128, {}), (128, {"DETERMINISTIC": True}), (64, {"FORM": 1})))
    (board,) = boards(select([
        row(causal, "hopper", loose, ms=0.5), row(causal, "hopper", ordered, ms=0.6),
        row(causal, "hopper", again, ms=0.7), row(causal, config=tile(64, 64), ms=0.8),
        row(causal, "fa4", ms=0.4), row(wide, "hopper", loose, ms=1.0), row(wide, "fa4", ms=1.0)]))
    assert [x["ours, same bits"] for x in table_rows(board_markdown(board))] == ["0.6000", "-"]


# Figures


def drawn(ax) -> list[Rectangle]:
    return [p for p in ax.patches if isinstance(p, Rectangle)]


def test_curves_have_a_panel_per_family_and_a_line_per_implementation(selection):
    figures = curve_figures(selection)
    (name,) = figures
    assert name == "latency-gpt-oss-64-8-x-64-bf16"
    latency, rate = figures[name].axes[:4], figures[name].axes[4:]
    assert [ax.get_title() for ax in latency] == ["fwd, causal", "bwd, causal", "fwd, window 128", "bwd, window 128"]
    lines = {line.get_label(): line for line in latency[0].get_lines()}
    assert set(lines) == {"triton", *synthetic.PEERS}
    ours = [selection.get(case("gpt-oss", "fwd", s).id).best for s in (1024, 2048)]
    assert list(lines["triton"].get_xdata()) == [1024, 2048]
    assert list(lines["triton"].get_ydata()) == [m.latency_ms for m in ours]
    assert lines["sdpa_flash"].get_linestyle() == "--" and lines["fa3"].get_linestyle() == "-"
    assert "upstream" not in {line.get_label() for line in latency[1].get_lines()}    # incorrect there
    rates = {line.get_label(): line for line in rate[0].get_lines()}
    assert list(rates["triton"].get_ydata()) == [m.row["tflops"] for m in ours]
    looks = {(line.get_color(), line.get_marker()) for line in lines.values()}
    assert len(looks) == len(lines)


def test_a_single_length_is_drawn_as_bars(full):
    figure = curve_figures(full)["latency-qwen2.5-7b-28-4-x-128-fp16"]
    assert [ax.get_title() for ax in figure.axes] == ["fwd, window 256, 4224", "bwd, window 256, 4224"]
    fwd = figure.axes[0]
    assert len(drawn(fwd)) == 8
    r = full.get(case("qwen2.5-7b", "fwd", 4224, 256, "float16").id)
    ends = {t.get_text(): b.get_x() + b.get_width() for t, b in zip(fwd.get_yticklabels(), drawn(fwd), strict=True)}
    assert ends["triton"] == pytest.approx(r.best.latency_ms)
    assert ends["eager"] == pytest.approx(r.eager.latency_ms)


def test_heat_map_shows_the_best_of_each_cell_and_marks_failures(selection):
    r = selection.get(case("gpt-oss", "fwd", 1024, 128).id)
    found = tile_cells(r)
    assert len(found) == 9
    for (m, n), cell in found.items():
        times = [x["latency_ms"] for x in r.own_rows
                 if x["status"] == "ok" and (x["config"]["BLOCK_M"], x["config"]["BLOCK_N"]) == (m, n)]
        assert isinstance(cell, Measured) and cell.latency_ms == min(times)
    dead = tile_cells(selection.get(case("gpt-oss", "fwd", 64, 16).id))
    assert dead == {(64, 64): "crashed", (64, 32): "crashed", (32, 32): "runtime_error"}

    figures = heatmap_figures(selection)
    assert set(figures) == {f"tiles-gpt-oss-64-8-x-64-bf16-{m}" for m in ("causal", "window-128", "window-16")}
    axes = [ax for ax in figures["tiles-gpt-oss-64-8-x-64-bf16-window-128"].axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == [f"{p}, {s}" for p in ("fwd", "bwd_dq", "bwd_dkdv") for s in (1024, 2048)]
    texts = [t.get_text() for t in axes[0].texts]
    assert tables.number(r.best.latency_ms) in texts and "w4 s3" in texts
    assert len(drawn(axes[0])) == 10                                # nine cells and the frame of the best
    frame = drawn(axes[0])[[p.get_fill() for p in drawn(axes[0])].index(False)]
    assert (frame.get_x() + 0.46, frame.get_y() + 0.46) == pytest.approx((0, 1))    # BLOCK_N 32, BLOCK_M 64
    bad = next(ax for ax in figures["tiles-gpt-oss-64-8-x-64-bf16-window-16"].axes if ax.get_title())
    assert sorted(p.get_hatch() or "" for p in drawn(bad)) == ["", "////", "////", "////"]
    assert sorted(t.get_text() for t in bad.texts) == ["crashed", "crashed", "runtime\nerror"]


def test_speedup_bars_end_at_the_speedup(selection):
    figures = speedup_figures(selection)
    assert set(figures) == {"speedup", "speedup-gpt-oss-64-8-x-64"}
    eager, flash, default = figures["speedup-gpt-oss-64-8-x-64"].axes
    labels = [t.get_text() for t in eager.get_yticklabels()]
    assert len(labels) == 8 == len(drawn(eager)) == len(drawn(flash)) == len(drawn(default))
    at = labels.index("bf16, fwd, window 128, 1024")
    r = selection.get(case("gpt-oss", "fwd", 1024, 128).id)
    for ax, rival in ((eager, r.eager), (flash, r.flash), (default, r.default)):
        bar = drawn(ax)[at]
        assert bar.get_x() + bar.get_width() == pytest.approx(rival.latency_ms / r.best.latency_ms)
        assert ax.get_xlim()[0] < bar.get_x() + bar.get_width() < ax.get_xlim()[1]
    assert flash.texts[at].get_text().endswith("fa3")
    overview = figures["speedup"].axes[0]
    assert len(drawn(overview)) == 4                               # one per pass and mask
    slower = select([row(FWD, config=tile(64, 32), ms=2.0), row(FWD, "eager", ms=1.0)])
    ax = speedup_figures(slower)["speedup"].axes[0]
    assert ax.get_xlim()[0] < 0.5 and drawn(ax)[0].get_hatch() == "////"
    assert [t.get_text().strip() for t in speedup_figures(slower)["speedup"].axes[1].texts] == ["no time"]


def test_roofline_has_the_cards_ceilings_and_a_point_per_case(full):
    ax = roofline_figures(full, synthetic.CARD)["roofline"].axes[0]
    lines = {line.get_label(): line for line in ax.get_lines()}
    measured = lines["measured: copy 3.02 TB/s, GEMM 754 TFLOP/s"]
    assert max(measured.get_ydata()) == pytest.approx(754) and len(measured.get_xdata()) == 400
    assert measured.get_ydata()[0] == pytest.approx(3.02 * measured.get_xdata()[0])
    assert "data sheet: 3.35 TB/s, 989.4 TFLOP/s" in lines
    filled = [p for p in ax.get_lines() if len(p.get_xdata()) == 1 and p.get_markerfacecolor() != "white"]
    won = [r for r in full.results if r.case.pass_ in ("fwd", "bwd") and r.best]
    assert len(filled) == len(won)
    assert sorted(p.get_ydata()[0] for p in filled) == pytest.approx(sorted(r.best.row["tflops"] for r in won))


def test_nothing_timed_draws_nothing():
    nothing = select([row(FWD, config={}, status="crashed")])
    assert curve_figures(nothing) == speedup_figures(nothing) == heatmap_figures(nothing) == {}
    assert roofline_figures(nothing, synthetic.CARD) == {}
    assert headline(nothing) == f"- **No winner** in 1 case: `{FWD.id}`."


# Files


def test_report_has_the_answer_first_and_every_plot(run_dir, selection):
    text = (run_dir / "report.md").read_text()
    assert text.startswith("# 20260102T030405Z-h100\n\nNVIDIA H100 80GB HBM3, 2026-01-02T03:04:05+00:00. 18 cases")
    assert text.index("## Best block sizes") < text.index("## Over the sequence length") < text.index("## Provenance")
    assert headline(selection) in text and tables.best_table(selection) in text
    plots = sorted((run_dir / "plots").glob("*.png"))
    assert len(plots) == 7
    for plot in plots:
        assert text.count(f"](plots/{plot.name})") == 1
        image = matplotlib.image.imread(plot)
        assert image.shape[0] > 200 and image.shape[1] > 400 and image[..., :3].std() > 0.01
    assert {p.stem for p in (run_dir / "plots").glob("*.svg")} == {p.stem for p in plots}
    assert all("<svg" in p.with_suffix(".svg").read_text()[:600] for p in plots)
    assert "580.65.06" in text and "aaaaaaaaaaaa" in text and "interpreter" not in text
    assert (run_dir / "tables" / "failures.md").read_text().strip() == tables.failure_table(selection)
    assert not (run_dir / "tables" / "workloads.md").exists()


def test_the_answer_names_the_implementation_that_is_not_the_portable_one():
    results = []
    for seqlen, hopper in ((1024, 0.2), (2048, 0.1)):
        c = case("gpt-oss", "fwd", seqlen)
        fast = {"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 2}
        results += [row(c, ms=0.15, config=tile(64, 64)), row(c, "hopper", fast, ms=hopper)]
    (family,) = [tables.family_configs(select(results).results)]
    assert family == "64x64 w4 s3 (1024); hopper: 128x128 s2 (2048)"


def test_headline_counts_and_means(selection):
    lines = headline(selection).splitlines()
    fwd = [r for r in selection.results if r.case.pass_ == "fwd" and r.best]
    mean = tables.geometric_mean([r.eager.latency_ms / r.best.latency_ms for r in fwd])
    won = sum(r.best.latency_ms <= r.best_peer.latency_ms for r in fwd)
    assert lines[0].startswith(f"- **fwd** (4 cases): {tables.number(mean)}x as fast as eager (")
    assert lines[0].endswith(f"fastest of all that apply the sink in {won} of 4 cases.")
    assert lines[2].startswith("- **How sure**: a clear winner in 16 of 16 cases")


def test_results_csv_has_the_contract_columns_and_the_speedups(run_dir, rows, selection):
    with (run_dir / "results.csv").open() as f:
        found = list(csv.DictReader(f))
    assert tuple(found[0]) == COLUMNS and len(found) == len(rows)
    by_key = {(r["case"], r["impl"], r["config"]): r for r in found}
    best = selection.get(case("gpt-oss", "fwd", 1024).id).best
    line = by_key[case("gpt-oss", "fwd", 1024).id, "triton", json.dumps(best.config, sort_keys=True)]
    assert float(line["speedup_vs_eager"]) == pytest.approx(best.row["speedup_vs_eager"]) and line["window"] == ""
    assert all(r["speedup_vs_eager"] == "" for r in found if r["status"] != "ok")
    with (run_dir / "best.csv").open() as f:
        assert len(list(csv.DictReader(f))) == len(selection.results)


def test_interpreter_runs_say_on_top_that_times_mean_nothing(tmp_path):
    rows = [row(FWD, config=tile(16, 32), ms=3.0, gpu="cpu"), row(FWD, "eager", ms=2.0, gpu="cpu")]
    run = synthetic.write_run(tmp_path / "cpu", rows, synthetic.ENV | {"gpu": "cpu", "sm_count": None})
    write_report(run)
    assert INTERPRETER_WARNING in (run / "report.md").read_text().split("##")[0]
    assert not (run / "plots" / "roofline.png").exists()
    assert (run / "plots" / "speedup.png").exists()


def test_report_reads_what_the_store_writes_and_can_be_written_again(tmp_path):
    run = tmp_path / "run"
    with Store(run) as store:
        store.write_environment({k: v for k, v in synthetic.ENV.items() if k not in ("schema_version", "fingerprint")})
        for r in (row(FWD, config=tile(64, 32), ms=0.1), row(FWD, "eager", ms=2.0),
                  row(FWD, "fa2", status="unavailable")):
            store.append(r)
    write_report(run)
    first = {p.name: p.read_bytes() for p in run.rglob("*.md")}
    (run / "plots" / "stale.png").write_bytes(b"")
    write_report(run)
    assert {p.name: p.read_bytes() for p in run.rglob("*.md")} == first
    assert not (run / "plots" / "stale.png").exists()


def test_rows_of_another_card_stay_out_of_the_report(tmp_path):
    rows = [row(FWD, config=tile(64, 32), ms=0.1), row(FWD, config=tile(64, 64), ms=0.05) | {"gpu": "NVIDIA H200"}]
    run = synthetic.write_run(tmp_path / "run", rows)
    write_report(run)
    text = (run / "report.md").read_text()
    assert "1 case, 1 trial: 1 ok." in text and "Rows of NVIDIA H200 in this directory" in text
    assert len((run / "best.csv").read_text().splitlines()) == 3


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match="env.json"):
        write_report(tmp_path)


@pytest.mark.parametrize("module", ["select", "tables", "plot_style", "heatmaps", "plots", "report", "overview",
                                    "chart_data", "charts", "trial_table", "html_report", "beside", "compare"])
def test_reporting_needs_no_gpu_library(module):
    tree = ast.parse((Path(sweeps.__file__).parent / f"{module}.py").read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not {name.split(".")[0] for name in names} & {"torch", "triton", "flash_sink_attn", "pynvml"}


def test_bars_of_a_varlen_batch_name_it_once():
    batch = case("gpt-oss", "fwd", 64, 128, batch=2, varlen="even", seqlens=(64, 64))
    (figure,) = curve_figures(select([row(batch, config=tile(64, 64), ms=1.0)])).values()
    assert [ax.get_title() for ax in figure.axes] == ["fwd, window 128, even (varlen, 2 up to 64)"]
