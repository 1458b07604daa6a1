"""What this machine has, and what the suite can do on it."""

from __future__ import annotations

import dataclasses
from typing import Any

from sweeps.auto import choose_config
from sweeps.devices import find_card
from sweeps.environment import environment
from sweeps.registry import OURS, built_in, load
from sweeps.walltime import find_wall_time


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Attributes:
        machine: what there is, by name, in words.
        implementations: per built-in name, why it cannot run here, or None, and its versions.
        advice: what to run on this machine, one line each.
    """

    machine: dict[str, str]
    implementations: dict[str, tuple[str | None, dict[str, str]]]
    advice: list[str]

    @property
    def healthy(self) -> bool:
        """Whether kernels of our own can run here, on a GPU or in the interpreter."""
        return any(self.implementations[name][0] is None for name in OURS if name in self.implementations)


def diagnose() -> Diagnosis:
    """Looks at GPU, driver, versions and every built-in implementation. Runs no kernel."""
    env = environment()
    return Diagnosis(_machine(env), {name: _implementation(name) for name in built_in()}, _advice(env))


def _implementation(name: str) -> tuple[str | None, dict[str, str]]:
    try:
        implementation = load(name)
        return implementation.unavailable(), implementation.versions()
    except Exception as error:  # a broken installation is what this command is for
        return f"{type(error).__name__}: {error}", {}


def _machine(env: dict[str, Any]) -> dict[str, str]:
    has_gpu = env["gpu"] != "cpu"
    card = find_card(env["gpu"], env["sm_count"]) if has_gpu else None
    facts = {
        "GPU": "none" if not has_gpu else
               f"{env['gpu']}, {env['sm_count']} SMs, {env['memory_bytes'] / 2**30:.0f} GiB, sm_{env['arch']}",
        "driver": env["driver"] or ("unknown" if has_gpu else "none"),
        "CUDA": env["cuda"] or "none (this PyTorch is built without it)",
        "torch": env["torch"], "triton": env["triton"] or "not installed", "python": env["python"],
        "CPU cores": str(env["cpu_count"]),
        "kernels run": "on the GPU" if has_gpu else "in Triton's interpreter: slow, right, and its times mean nothing",
        "wall_ms": _wall_source(),
    }
    if has_gpu:
        facts["peaks"] = ("unknown for this card: pct_peak and the roofline stay empty" if card is None else
                          f"{card.peak_tflops:g} TFLOP/s, {card.peak_tb_per_s:g} TB/s (data sheet of {card.name})")
    return facts


def _wall_source() -> str:
    wall_time, note = find_wall_time()
    return "lm-profiler's WallTime" if wall_time is not None else f"our own clock ({note})"


def _advice(env: dict[str, Any]) -> list[str]:
    try:
        config, why = choose_config(env["gpu"])
    except FileNotFoundError:
        return ["python -m sweeps run CONFIG.yaml    a config of your own; the project's lie in its checkout"]
    lines = [("python run_sweep.py auto", f"the main job here: {config.name}, since {why}")]
    if env["gpu"] == "cpu":
        lines.append(("python run_sweep.py configs/h100.yaml --compile-only", "builds every candidate for sm_90"))
    elif config.name != "quick.yaml":
        lines.append(("python run_sweep.py configs/quick.yaml", "a first look, under two minutes"))
    width = max(len(command) for command, _ in lines)
    return [f"{command:{width}}    {what}" for command, what in lines]
