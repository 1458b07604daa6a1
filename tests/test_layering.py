"""Data flows one way: a module of sweeps imports only modules that stand before it, and the kernels know no sweep."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flash_sink_attn

ROOT = Path(__file__).resolve().parent.parent

# The order of the flow. A new module must be given its place here. Names on one line do not import each other.
SWEEPS = (
    ("cases", "columns", "devices", "presets", "failures", "child", "walltime", "environment", "energy", "paired",
     "sampling"),
    ("cost", "fields", "implementation", "sensors", "occupancy", "strategies", "carried_cache"),
    ("spec", "bound", "placements", "final_timing"),
    ("specfile", "expand"),
    ("baselines.common",),
    ("baselines.*", "ours"),
    ("registry", "candidates"),
    ("plan",),
    ("gate", "measure", "compile_pool", "search"),
    ("finals", "contest", "subjects"),
    ("agreement", "hosttime"),
    ("worker", "store", "supervisor"),
    ("rows", "predict", "workers", "jobs", "summary"),
    ("runner",),
    ("measured",),
    ("verdict",),
    ("select",),
    ("duels",),
    ("repeat",),
    ("repeat_runs",),
    ("tables", "sittings"),
    ("overview", "board", "packed", "trial_table", "terminal_answer", "compile_table", "replay"),
    ("plot_style",),
    ("heatmaps",),
    ("plots", "chart_data", "charts"),
    ("html_report", "compare"),
    ("beside", "compare_text"),
    ("auto", "cover", "models"),
    ("tune",),
    ("report", "export", "doctor", "console"),
    ("regret", "reporting_commands"),
    ("ladder", "heldout", "dispatched"),
    ("measuring_cli", "judging_cli"),
    ("cli",),
    ("__main__",),
)
# Of the package: what a module may import is what stands before it. __init__ re-exports, so nothing inside imports it.
PACKAGE = (
    ("_mode", "config", "devices", "_reference_blocks", "layout"),
    ("validity",),
    ("replay", "kernel_code", "options", "reference", "tuned_table", "sliding_cache", "kernels.common",
     "kernel_cache", "sass_check", "hopper.common"),
    ("estimate",),
    ("regimes",),
    ("launcher", "nearest", "machine_code", "sass_loops", "heuristic", "hopper.support", "hopper.backward_common",
     "hopper.descriptors", "hopper.sections"),
    ("hopper.backward_walk", "hopper.staging", "hopper.cluster"),
    ("hopper.backward_products",),
    ("hopper.backward_wide_common",),
    ("testing", "dispatch", "kernels.*", "hopper.*"),
    ("kernels.launch", "hopper.launch_forward", "hopper.launch_backward", "selection"),
    ("_checks", "compile_only"),
    ("calls", "flash_attn_with_sink"),
    ("api",),
    ("gpt_oss", "explanation"),
    ("__init__",),
)


def modules(package: str) -> dict[str, Path]:
    """Dotted name inside the package -> file."""
    root = ROOT / package
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}


def level(name: str, order: tuple[tuple[str, ...], ...]) -> int | None:
    """The place of a module; an exact name goes before a "folder.*"."""
    for wanted in (name, f"{name.rpartition('.')[0]}.*"):
        for number, names in enumerate(order):
            if wanted in names:
                return number
    return None


def imports(path: Path, package: str) -> set[str]:
    """The project's modules that a file imports, anywhere in it, as full dotted names."""
    found: set[str] = set()
    known = {f"{p}.{name}".removesuffix(".__init__") for p in ("sweeps", "flash_sink_attn") for name in modules(p)}
    here = [package, *path.relative_to(ROOT / package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module or ""
            )
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value)]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] in ("sweeps", "flash_sink_attn")}
    return found


def violations(package: str, order: tuple[tuple[str, ...], ...]) -> list[str]:
    found = []
    for name, path in modules(package).items():
        place = level(name, order)
        if name.endswith("__init__") and place is None:
            place = 0  # a package's marker: it may import nothing of the project
        assert place is not None, f"{package}.{name}: a new module must be given its place in tests/test_layering.py"
        for imported in imports(path, package):
            top, _, rest = imported.partition(".")
            if top != package:
                if package == "flash_sink_attn":
                    found.append(f"{package}.{name} imports {imported}")
                continue
            target = level(rest, order) if rest else -1 if package == "sweeps" else level("__init__", order)
            if rest and f"{rest}.__init__" in modules(package):
                target = -1  # a package's marker stands before everything
            if target is None or target >= place:
                found.append(f"{package}.{name} imports {imported}")
    return found


def test_sweeps_flows_one_way() -> None:
    assert violations("sweeps", SWEEPS) == []


def test_the_package_flows_one_way_and_knows_no_sweep() -> None:
    assert violations("flash_sink_attn", PACKAGE) == []


@pytest.mark.parametrize("package,order", [("sweeps", SWEEPS), ("flash_sink_attn", PACKAGE)])
def test_the_order_names_no_module_that_is_gone(package: str, order: tuple[tuple[str, ...], ...]) -> None:
    there = set(modules(package)) | {f"{name.rpartition('.')[0]}.*" for name in modules(package)}
    assert [name for names in order for name in names if name not in there] == []


def test_implementations_do_not_import_each_other() -> None:
    for name, path in modules("sweeps").items():
        if name.startswith("baselines.") and name != "baselines.common":
            others = {i for i in imports(path, "sweeps") if i.startswith("sweeps.baselines.")} - {
                "sweeps.baselines.common"
            }
            assert not others, f"{name} imports {others}"


def test_the_two_families_of_kernels_do_not_import_each_other() -> None:
    for mine, other in (("kernels", "hopper"), ("hopper", "kernels")):
        for name, path in modules("flash_sink_attn").items():
            if name.startswith(f"{mine}."):
                found = {i for i in imports(path, "flash_sink_attn") if i.startswith(f"flash_sink_attn.{other}")}
                assert not found, f"{name} imports {found}"


def test_imports_are_found_however_they_are_written(tmp_path: Path) -> None:
    source = ROOT / "sweeps" / "plan.py"
    assert {"sweeps.cases", "sweeps.registry", "sweeps.spec"} <= imports(source, "sweeps")
    assert "sweeps.baselines" in imports(ROOT / "sweeps" / "registry.py", "sweeps")


def test_reading_a_run_needs_no_kernel_and_no_gpu_module() -> None:
    """Choosing and reporting work on files alone."""
    for name in ("paired", "measured", "verdict", "select", "tables", "plot_style", "heatmaps", "plots", "report"):
        source = ast.parse((ROOT / "sweeps" / f"{name}.py").read_text())
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(source)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imported |= {(node.module or "").split(".")[0] for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"torch", "triton"}, name


def test_importing_the_package_or_a_worker_brings_no_compiler_of_graphs() -> None:
    """torch._dynamo takes two seconds to import: what needs it is imported when it is used."""
    code = "import sys, flash_sink_attn, sweeps.worker, sweeps.compile_pool; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
    assert {"replace_gpt_oss_with_flash_sink_attn", "restore_gpt_oss_attention"} <= set(flash_sink_attn.__all__)
    assert callable(flash_sink_attn.restore_gpt_oss_attention)
