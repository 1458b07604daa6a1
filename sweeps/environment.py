"""What a number depends on besides the case and the config: the card, its driver, the versions, the kernel source."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

TIMING_MODE = "cold-l2-spin-2"  # bump when measure.py changes what latency_ms means
INTERPRETER_MODE = "interpreter-1"

# Distributions whose version can change a peer's number.
PEERS = ("flash-attn", "flash-attn-3", "tokenspeed-fa3", "flash-attn-4", "nvidia-cutlass-dsl",
         "nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "tilelang")

# Variables of Triton that say where things lie, not what is built.
_TRITON_PLACES = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR")

# What of the environment belongs to a row's key. Everything else in it is for the reader.
# Besides the kernels: what decides with which configuration, and how, they are launched.
_DECIDING = ("config", "dispatch", "heuristic", "selection", "calls", "launcher", "replay", "layout", "api")
_KEY_FIELDS = ("gpu", "sm_count", "memory_bytes", "driver", "cuda", "torch", "triton", "kernel_source", "timing_mode",
               "triton_env")

_ROOT = Path(__file__).resolve().parent.parent


def environment(device: int = 0) -> dict[str, Any]:
    """Describes this machine, JSON-ready. Creates no CUDA context of its own.

    Returns:
        gpu ("cpu" without CUDA), gpu_uuid, sm_count, memory_bytes, l2_bytes, shared_bytes_per_block, arch (sm number
        such as 90; None without CUDA), driver, cuda, torch, triton, python, platform, cpu_count, packages (peers that
        are installed), git_commit and git_dirty (None outside a checkout), kernel_source (hash of the kernels'
        source), kernel_code and hopper_kernel_code (hashes of what of it runs on the GPU, as tuned tables name them),
        timing_mode and triton_env.
        What cannot be found out is None.
    """
    import torch

    from flash_sink_attn.kernel_code import CODE_FIELD, kernel_code_hash

    found: dict[str, Any] = {
        "gpu": "cpu", "gpu_uuid": None, "sm_count": None, "memory_bytes": None, "l2_bytes": None,
        "shared_bytes_per_block": None, "arch": None, "driver": None, "cuda": torch.version.cuda,
        "torch": torch.__version__, "triton": version_of("triton"), "python": platform.python_version(),
        "platform": platform.platform(), "cpu_count": len(os.sched_getaffinity(0)), "packages": _installed(PEERS),
        "kernel_source": kernel_source_hash(), **{field: kernel_code_hash(impl) for impl, field in CODE_FIELD.items()},
        "timing_mode": INTERPRETER_MODE,
        "triton_env": {name: value for name, value in sorted(os.environ.items())
                       if name.startswith("TRITON_") and name not in _TRITON_PLACES},
    }
    if not torch.cuda.is_available():
        found["triton_env"].pop("TRITON_INTERPRET", None)  # the package sets it by itself, sooner or later
    found["git_commit"], found["git_dirty"] = _git()
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": card.name, "gpu_uuid": str(getattr(card, "uuid", "")) or None,
            "sm_count": card.multi_processor_count, "memory_bytes": card.total_memory,
            "l2_bytes": getattr(card, "L2_cache_size", None),
            "shared_bytes_per_block": getattr(card, "shared_memory_per_block_optin", None),
            "arch": card.major * 10 + card.minor, "driver": _driver(), "timing_mode": TIMING_MODE,
        }
    return found


def fingerprint(env: Mapping[str, Any]) -> str:
    """Twelve hex digits that change whenever something in ``env`` that could change a number does."""
    return hashlib.sha256(_canonical({name: env.get(name) for name in _KEY_FIELDS}).encode()).hexdigest()[:12]


def row_key(trial_id: str, versions: Mapping[str, str], env: Mapping[str, Any]) -> str:
    """The key of a row: trial (case, implementation, config, options), implementation versions, environment."""
    parts = [trial_id, dict(versions), fingerprint(env)]
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()[:16]


def kernel_source_hash(root: Path | None = None) -> str:
    """Twelve hex digits over the files of flash_sink_attn that decide what a launch computes and how fast."""
    package = (root or _ROOT) / "flash_sink_attn"
    files = [file for folder in ("kernels", "hopper") for file in sorted((package / folder).rglob("*.py"))]
    files += [package / f"{name}.py" for name in _DECIDING if (package / f"{name}.py").is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None where it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def nvml_handle(uuid: str | None, index: int = 0) -> tuple[Any, Any] | None:
    """(pynvml, device handle) of the card with this UUID, else of ``index``; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # absent package, absent library, no permission: all mean "no sensors"
        return None
    if uuid:
        name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        for spelling in (name, name.encode()):  # older releases of the binding want bytes
            try:
                return pynvml, pynvml.nvmlDeviceGetHandleByUUID(spelling)
            except Exception:
                continue
    try:
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
    except Exception:
        return None


def _driver() -> str | None:
    nvml = nvml_handle(None)
    if nvml is None:
        return None
    try:
        version = nvml[0].nvmlSystemGetDriverVersion()
    except Exception:
        return None
    return version.decode() if isinstance(version, bytes) else version


def _installed(names: tuple[str, ...]) -> dict[str, str]:
    return {name: version for name in names if (version := version_of(name)) is not None}


def _git() -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _ROOT:  # installed into somebody else's checkout
        return None, None
    status = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD"), None if status is None else bool(status)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
