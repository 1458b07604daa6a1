"""The command line: what it says, its exit codes, and one small run from end to end."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import sweeps.cli
from sweeps.auto import choose_config
from sweeps.console import RunProgress
from sweeps.doctor import Diagnosis, diagnose
from sweeps.environment import environment
from sweeps.registry import built_in
from sweeps.runner import RunError, RunSummary

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"

TINY = """
name: tiny
description: one shape
implementations: [triton, eager]
passes: [fwd]
shapes: {heads: [[2, 1]], head_dim: 16, seqlen: 17, window: 8}
tunables: {fwd: {BLOCK_M: [16, 256], BLOCK_N: 16, num_warps: 1, num_stages: 1}}
timing: {min_samples: 1, max_samples: 1, max_ms: 1, warmup_ms: 0, wall_ms: 0}
"""


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(sweeps.cli.app, list(arguments))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def on(monkeypatch: pytest.MonkeyPatch, gpu: str, **facts: Any) -> None:
    """Lets the command line believe it is on a machine with this GPU."""
    here = environment() | {"gpu": gpu, "sm_count": 132, "memory_bytes": 80 << 30, "arch": 90, "driver": "1"} | facts
    monkeypatch.setattr(sweeps.cli, "environment", lambda: here)
    monkeypatch.setattr("sweeps.doctor.environment", lambda: here)


def ends(monkeypatch: pytest.MonkeyPatch, stopped: str = "", error: BaseException | None = None) -> dict[str, Any]:
    """Replaces the runner with one that ends at once; returns what it was called with."""
    seen: dict[str, Any] = {}

    def run(spec: Any, run_dir: Path, **more: Any) -> RunSummary:
        if error is not None:
            raise error
        seen.update(more, spec=spec, run_dir=run_dir, trials=[phase([]) for phase in more["phases"]])
        (run_dir / "trials.jsonl").touch()
        return RunSummary(run_dir, {"ok": 2, "timeout": 1}, 3, 4, stopped, 5.0, 0.5, {})

    monkeypatch.setattr(sweeps.cli, "run_trials", run)
    monkeypatch.setattr(sweeps.cli, "write_report", lambda run_dir: seen.update(reported=run_dir))
    return seen


def test_a_dry_run_says_what_would_run_and_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    result = cli("run", str(tiny), "--dry-run", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert "one shape" in result.output and "4 trials, and up to 0" in result.output
    assert not (tmp_path / "out").exists()
    line = next(line.split() for line in result.output.splitlines() if line.strip().startswith("2/1"))
    assert line[:8] == ["2/1", "x", "16", "8", "bf16", "17", "2", "1"]  # ..., two candidates forward, one rejected
    names = {
        words[0]: words[1]
        for words in map(str.split, result.output.splitlines())
        if words[:1] in (["triton"], ["eager"])
    }
    assert names == {"triton": "yes", "eager": "yes"}


@pytest.mark.parametrize("name", ["cpu", "quick", "upstream", "h100", "h200", "h20"])
def test_every_config_can_be_planned_on_any_machine(name: str) -> None:
    result = cli("run", str(CONFIGS / f"{name}.yaml"), "--dry-run")
    assert result.exit_code == 0, result.output
    assert ("Nobody has run this config on its card yet (H20)" in result.output) == (name == "h20")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["gone.yaml"], "gone.yaml: cannot be read"),
        (["TINY", "--set", "shapes.windwo=3"], "shapes: unknown key 'windwo', did you mean 'window'?"),
        (["TINY", "--set", "implementations=[eagr]"], "did you mean 'eager'"),
        (["TINY", "--only", "llama*"], "--only: 'llama*' matches no case"),
        (["--resume", "nowhere"], "--resume: expected the directory of a run, got nowhere"),
        (["TINY", "--resume", "a", "--out", "b"], "expected either --out or --resume"),
    ],
)
def test_a_bad_config_is_exit_code_2(tiny: Path, arguments: list[str], message: str) -> None:
    result = cli("run", *(str(tiny) if a == "TINY" else a for a in arguments))
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize(
    "gpu,config,why",
    [
        ("cpu", "cpu", "no GPU"),
        ("NVIDIA H100 80GB HBM3", "h100", "made for the NVIDIA H100 80GB HBM3"),
        ("NVIDIA H200", "h200", "made for the NVIDIA H200"),
        ("NVIDIA H20", "h20", "made for the NVIDIA H20"),
        ("NVIDIA H100 PCIe", "quick", "there is no h100-pcie.yaml for the NVIDIA H100 PCIe"),
        ("NVIDIA GeForce RTX 4090", "quick", "there is no rtx-4090.yaml"),
    ],
)
@pytest.mark.parametrize("arguments", [("auto",), ()])
def test_auto_takes_the_machines_own_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: str, config: str, why: str, arguments: tuple[str, ...]
) -> None:
    """Also without an argument; and the config it picks is one that this machine may run."""
    on(monkeypatch, gpu, arch=None if gpu == "cpu" else 90)
    seen = ends(monkeypatch)
    result = cli("run", *arguments, "--out", str(tmp_path / "out"), "--only", "eager")
    assert result.exit_code == 0, result.output
    said = next(line for line in result.output.splitlines() if line.startswith("auto: "))
    assert f"{config}.yaml, since" in said and why in said
    assert seen["spec"].name == config


def test_auto_without_a_checkout_is_exit_code_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweeps.cli, "choose_config", lambda gpu: choose_config(gpu, tmp_path))
    result = cli("run", "auto")
    assert result.exit_code == 2 and "which does not exist; name a config" in result.output


def test_resuming_takes_the_runs_config_and_not_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends(monkeypatch)
    (tmp_path / "trials.jsonl").touch()
    (tmp_path / "spec.yaml").write_text(TINY)
    result = cli("run", "--resume", str(tmp_path))
    assert result.exit_code == 0 and "auto" not in result.output and "tiny" in result.output


def test_another_card_is_exit_code_3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    on(monkeypatch, "NVIDIA H200")
    seen = ends(monkeypatch)
    result = cli("run", str(CONFIGS / "h100.yaml"))
    assert result.exit_code == 3 and not seen
    assert "made for H100, this machine has a NVIDIA H200" in result.output and "--any-gpu" in result.output
    assert cli("run", str(CONFIGS / "h100.yaml"), "--any-gpu").exit_code == 0
    assert seen["run_dir"].parent == Path("results/h200") and seen["run_dir"].name.endswith("-h100")


def test_no_gpu_is_exit_code_3_with_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "cpu", arch=None)
    result = cli("run", str(CONFIGS / "quick.yaml"))
    assert result.exit_code == 3
    assert (
        "no CUDA device" in result.output and "--compile-only" in result.output and "configs/cpu.yaml" in result.output
    )


def test_the_options_reach_the_runner(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    seen = ends(monkeypatch)
    result = cli(
        "run",
        str(tiny),
        "--out",
        str(tmp_path / "out"),
        "--limit",
        "1.5",
        "--only",
        "eager",
        "--retry",
        "crashed",
        "--set",
        "seed=9",
    )
    assert result.exit_code == 0
    assert (seen["limit_minutes"], seen["retry"], seen["compile_only"]) == (1.5, ("crashed",), False)
    assert seen["spec"].seed == 9 and seen["run_dir"] == tmp_path / "out" == seen["reported"]
    assert [[t.impl for t in trials] for trials in seen["trials"]] == [["eager"], [], [], []]  # and finals, and duels
    assert "2 ok, 1 timeout; 3 new in 5 s, device busy 50%" in result.output


def test_interrupted_is_exit_code_130_with_the_way_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    seen = ends(monkeypatch, "interrupted")
    result = cli("run", str(tiny), "--out", str(out))
    assert result.exit_code == 130 and seen["reported"] == out  # tables are written all the same
    assert f"python run_sweep.py --resume {out}" in result.output.replace("\n", "") and "4 trials" in result.output
    ends(monkeypatch, error=KeyboardInterrupt())
    assert cli("run", "--resume", str(out)).exit_code == 130


def test_the_time_limit_is_no_failure(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    ends(monkeypatch, "limit")
    result = cli("run", str(tiny), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0 and "time limit reached, 4 trials of this round left" in result.output


def test_a_run_that_cannot_go_on_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    ends(monkeypatch, error=RunError("no worker can be started"))
    result = cli("run", str(tiny), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1 and "no worker can be started" in result.output and "--resume" in result.output


def test_a_run_is_resumed_with_its_own_config(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ends(monkeypatch)
    cli("run", str(tiny), "--out", str(out), "--set", "seed=5")
    seen = ends(monkeypatch)
    assert cli("run", "--resume", str(out)).exit_code == 0
    assert seen["spec"].seed == 5 and seen["run_dir"] == out
    again = cli("run", str(tiny), "--out", str(out))
    assert again.exit_code == 2 and "holds a run already" in again.output


def test_compile_only_needs_no_card_and_builds_no_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    on(monkeypatch, "cpu", arch=None)
    seen = ends(monkeypatch)
    result = cli("run", str(CONFIGS / "h100.yaml"), "--compile-only", "--only", "mimo*")
    assert result.exit_code == 0, result.output
    ends(monkeypatch, "limit")
    again = cli("run", str(CONFIGS / "h100.yaml"), "--compile-only", "--only", "mimo*").output.replace("\n", "")
    assert f"--resume results/compiled-h100/{seen['run_dir'].name}"[:40] in again
    assert again.rstrip().endswith("--only 'mimo*' --compile-only")
    assert seen["compile_only"] and seen["run_dir"].parent == Path("results/compiled-h100") and "reported" not in seen
    (trials,) = seen["trials"]
    assert {t.impl for t in trials} == {"triton", "hopper"}
    assert {t.case.pass_ for t in trials if t.impl == "triton"} == {"fwd", "bwd_dq", "bwd_dkdv"}


def test_help_has_examples() -> None:
    done = subprocess.run([sys.executable, "run_sweep.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for option in ("--out", "--dry-run", "--only", "--set", "--resume", "--limit", "--any-gpu", "--compile-only"):
        assert option in done.stdout
    assert "python run_sweep.py auto" in done.stdout and "configs/cpu.yaml" in done.stdout
    assert "--set 'shapes.window=[256]'" in done.stdout


def test_the_module_lists_its_commands() -> None:
    result = cli("--help")
    assert all(name in result.output for name in ("run", "doctor", "report", "export"))


def test_doctor_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "NVIDIA H100 80GB HBM3")
    found = diagnose()
    assert found.machine["GPU"] == "NVIDIA H100 80GB HBM3, 132 SMs, 80 GiB, sm_90"
    assert found.machine["peaks"] == "989.4 TFLOP/s, 3.35 TB/s (data sheet of H100)"
    assert "auto" in found.advice[0] and "h100.yaml" in found.advice[0] and "quick.yaml" in found.advice[1]
    assert set(found.implementations) == set(built_in())
    on(monkeypatch, "cpu", arch=None)
    found = diagnose()
    assert found.machine["GPU"] == "none" and "interpreter" in found.machine["kernels run"]
    assert "cpu.yaml" in found.advice[0] and "h100.yaml --compile-only" in found.advice[1]


def test_doctor_prints_it_and_fails_only_where_our_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sick = Diagnosis({"GPU": "none"}, {"triton": ("no triton here", {}), "fa3": (None, {"fa3": "3.0"})}, ["run this"])
    monkeypatch.setattr(sweeps.cli, "diagnose", lambda: sick)
    result = cli("doctor")
    assert result.exit_code == 1
    assert all(text in result.output for text in ("no triton here", "fa3 3.0", "run this"))
    on_another_card = Diagnosis({}, {"triton": (None, {}), "hopper": ("they need another card", {})}, [])
    monkeypatch.setattr(sweeps.cli, "diagnose", lambda: on_another_card)
    assert cli("doctor").exit_code == 0


def test_report_and_export_say_what_is_not_a_run(tmp_path: Path) -> None:
    for command in ("report", "export"):
        result = cli(command, str(tmp_path / "gone"))
        assert result.exit_code == 1 and "gone" in result.output


def test_a_small_run_from_end_to_end(tiny: Path, tmp_path: Path) -> None:
    """The command a user types, in a process of its own, then once more to find nothing left to do."""
    out = tmp_path / "out"
    # Extended, not replaced: what is installed may be found through it.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "run_sweep.py"), str(tiny)]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert sorted((row["impl"], row["status"]) for row in rows) == [
        ("eager", "ok"),
        ("triton", "ok"),
        ("triton", "ok"),
        ("triton", "rejected"),
    ]
    assert all(0 < row["rel_err_o"] < 0.01 for row in rows if row["status"] == "ok")
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    with (out / "best.csv").open() as file:
        (best,) = csv.DictReader(file)
    assert best["impl"] == "triton" and best["status"] == "ok"
    assert (out / "report.md").is_file() and "Best block sizes" in done.stdout
    before = (out / "trials.jsonl").read_bytes()
    again = subprocess.run(
        [sys.executable, str(ROOT / "run_sweep.py"), "--resume", str(out)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0 and "0 new in" in again.stdout
    assert (out / "trials.jsonl").read_bytes() == before


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_done_failed_and_best(terminal: bool) -> None:
    """Three trials, of which one is wrong and one is a peer's, whose time is not our best."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160)
    rows = [("triton", "ok", 2.5), ("fa3", "ok", 1.0), ("triton", "incorrect", None)]
    with RunProgress(console) as progress:
        progress({"event": "phase", "phase": 1, "total": 4, "done": 1})
        progress({"event": "note", "message": "a [note]"})
        for done, (impl, status, ms) in enumerate(rows, 2):
            row: dict[str, Any] = {
                "impl": impl,
                "status": status,
                "latency_ms": ms,
                "case": "c",
                "config": {},
                "message": "o is off",
            }
            progress({"event": "row", "row": row, "done": done, "total": 4})
    shown = text.getvalue()
    assert "ok 2, failed 1, best 2.5 ms" in shown and "a [note]" in shown
    assert "3 trials, 1 of 4 done before" in shown and ("incorrect" in shown and "o is off" in shown)
    assert "3/3" in shown if terminal else "round 1: 4/4" in shown
