"""A made-up run that looks like a real one: plausible times, noise, ties, failures of every kind, absent peers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from sweeps.cases import Case
from sweeps.columns import COLUMNS
from sweeps.cost import compulsory_bytes, floor_ms, flops
from sweeps.devices import find_card

GPU = "NVIDIA H100 80GB HBM3"
CARD = find_card(GPU)
assert CARD is not None

MODELS = {
    "gpt-oss": {"heads_q": 64, "heads_kv": 8, "head_dim": 64, "head_dim_v": 64},
    "llama-70b": {"heads_q": 64, "heads_kv": 8, "head_dim": 128, "head_dim_v": 128},
    "qwen2.5-7b": {"heads_q": 28, "heads_kv": 4, "head_dim": 128, "head_dim_v": 128},
    "mimo-v2-flash": {"heads_q": 64, "heads_kv": 8, "head_dim": 192, "head_dim_v": 128},
}
# impl: (times the floor, applies the sink, is flash, passes)
PEERS = {
    "eager": (45.0, True, False, ("fwd", "bwd")), "sdpa_flash": (2.3, False, True, ("fwd", "bwd")),
    "sdpa_cudnn": (1.6, False, True, ("fwd", "bwd")), "flex": (2.1, True, False, ("fwd", "bwd")),
    "fa3": (1.25, True, True, ("fwd",)), "fa4": (1.35, True, True, ("fwd", "bwd")),
    "cudnn": (1.5, True, True, ("fwd", "bwd")), "gptoss_triton": (2.0, True, False, ("fwd",)),
    "upstream": (3.2, True, False, ("fwd", "bwd")),
}
TILES = [(m, n, w, s) for m in (32, 64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)]
ENV = {
    "schema_version": 1, "fingerprint": "0123456789ab", "started": "2026-01-02T03:04:05+00:00", "gpu": GPU,
    "sm_count": 132, "memory_bytes": 85045018624, "driver": "580.65.06", "cuda": "13.0", "torch": "2.11.0+cu130",
    "triton": "3.6.0", "python": "3.12.3", "arch": 90, "packages": {"flash-attn-4": "4.0.0b1"}, "git_commit": "0" * 40,
    "git_dirty": False, "kernel_source": "aaaaaaaaaaaa", "timing_mode": "cold-l2-spin-1", "triton_env": {},
    "earlier": [],
}


def case(model: str, pass_: str, seqlen: int, window: int | None = None, dtype: str = "bfloat16", **more: Any) -> Case:
    fields: dict[str, Any] = {"pass_": pass_, "dtype": dtype, "batch": 1, "seqlen_q": seqlen, "seqlen_k": seqlen,
                              "window": window, "model": model, **MODELS[model]}
    return Case(**(fields | more))


def row(c: Case, impl: str = "triton", config: dict[str, Any] | None = None, status: str = "ok",
        ms: float | None = None, *, noise: float = 0.004, samples: int = 30, **more: Any) -> dict[str, Any]:
    """One row of the log; with ``ms`` its samples are spread evenly over ms * (1 +- noise)."""
    config = config or {}
    r: dict[str, Any] = dict.fromkeys(COLUMNS)
    r |= {"gpu": GPU, "model": c.model, "case": c.id, "impl": impl, "case_fields": c.to_dict(), "config": config,
          "status": status, "message": "" if status == "ok" else f"{status} of {impl}", "note": "", **c.columns(),
          **{k: config.get(k) for k in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")},
          "applies_sink": True, "is_flash": False, "is_default": False}
    if ms is not None:
        spread = [ms * (1 + noise * (2 * i / max(samples - 1, 1) - 1)) for i in range(samples)]
        assert CARD is not None
        r |= {"latency_ms": ms, "samples_ms": spread, "samples": samples, "stop_reason": "precision",
              "tflops": flops(c) / ms / 1e9, "pct_peak": flops(c) / ms / 1e9 / CARD.peak_tflops * 100,
              "gb_per_s": compulsory_bytes(c) / ms / 1e6, "latency_ms_p20": ms * (1 - noise * 0.6),
              "latency_ms_p80": ms * (1 + noise * 0.6)}
    r |= more
    r["key"] = f"{c.id}/{impl}/{json.dumps(config, sort_keys=True)}/{more.get('is_default', False)}"
    return r


def tile(m: int, n: int, w: int = 4, s: int = 3, **more: Any) -> dict[str, Any]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s, "PACK_GQA": False, "SPLIT_LOOPS": True,
            "maxnreg": None, **more}


def plausible_ms(c: Case, config: dict[str, Any], rng: random.Random) -> float:
    """Best near 64x64 with 4 warps, narrower keys under a window; within 2 to 4 times the floor."""
    assert CARD is not None
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    want_n = 32 if c.window else 64
    penalty = 1 + 0.25 * abs(m // 64 - 1) + 0.2 * abs(n / want_n - 1) + 0.12 * (config["num_warps"] == 8)
    penalty += 0.04 * (config["num_stages"] == 2)
    return (0.006 + 1.3 * floor_ms(c, CARD) * penalty) * rng.uniform(0.99, 1.01)


def failure(c: Case, config: dict[str, Any]) -> tuple[str, str] | None:
    """Status and message of the configurations that do not work."""
    m, n, w = config["BLOCK_M"], config["BLOCK_N"], config["num_warps"]
    if m == n == 128 and w == 4 and c.head_dim >= 128:
        return "rejected", f"accumulators need {2 * c.head_dim} registers per thread, 255 are available"
    if n == 128 and config["num_stages"] == 3 and c.head_dim >= 128:
        return "out_of_resources", f"shared memory: {240000 + c.head_dim} bytes needed, 232448 available"
    if m == 32 and w == 8 and n == 32:
        return "compile_error", "LLVM: cannot convert layout | #mma<{version = 3}>"
    if (m, n, w) == (128, 64, 8) and c.head_dim == 64:
        return "incorrect", "o: relative error 0.61, allowed 0.0085; worst row batch 0 head 3 row 77"
    if (m, n, w) == (32, 128, 8) and c.pass_ == "bwd_dkdv":
        return "timeout", "measuring took longer than 20 s"
    return None


def case_rows(c: Case, rng: random.Random) -> list[dict[str, Any]]:
    """Rows of our kernel (or pair) and of every peer for one case."""
    assert CARD is not None
    rows = []
    if c.pass_ == "bwd":
        for i, (dq, dkdv) in enumerate([((64, 64), (64, 64)), ((64, 64), (32, 64)), ((64, 32), (32, 64))]):
            config = {"bwd_dq": tile(*dq), "bwd_dkdv": tile(*dkdv)}
            rows.append(row(c, config=config, ms=1.6 * floor_ms(c, CARD) * (1 + 0.03 * i) + 0.01, is_default=i == 2))
    else:
        for t in TILES:
            config = tile(*t)
            bad = failure(c, config)
            ms = plausible_ms(c, config, rng)
            default = t == (128, 64, 4, 3)
            if bad:
                # a wrong result is timed as well, and must not win however fast it is
                rows.append(row(c, config=config, status=bad[0], message=bad[1], is_default=default,
                                latency_ms=ms / 3 if bad[0] == "incorrect" else None))
            else:
                rows.append(row(c, config=config, ms=ms, is_default=default))
    for impl, (factor, sink, flash, passes) in PEERS.items():
        if c.pass_ not in ("fwd", "bwd"):
            rows.append(row(c, impl, status="unsupported", message="parts are swept for our own kernels only"))
        elif c.pass_ not in passes:
            rows.append(row(c, impl, status="unsupported", message=f"{impl} has no backward with a sink"))
        elif impl.startswith("sdpa") and c.window:
            rows.append(row(c, impl, status="unsupported", message="no window"))
        elif impl == "eager" and c.seqlen_q > 16384:
            rows.append(row(c, impl, status="oom", message="CUDA out of memory. Tried to allocate 128.00 GiB"))
        elif impl == "upstream" and c.pass_ == "bwd":
            rows.append(row(c, impl, status="incorrect", message="dk: relative error 0.036, allowed 0.0145"))
        else:
            extra = 0.02 if c.window else 0.004
            causal = c.window is not None and impl == "eager"
            base = floor_ms(c if not causal else Case.from_dict(c.to_dict() | {"window": None}), CARD)
            rows.append(row(c, impl, ms=(base * factor + extra) * rng.uniform(0.97, 1.03), applies_sink=sink,
                            is_flash=flash))
    rows.append(row(c, "fa2", status="unavailable", message="flash_attn is not installed"))
    return rows


def run_rows(
    seqlens: tuple[int, ...] = (1024, 2048, 4096, 8192), *, small: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """A whole run; ``small`` keeps gpt-oss with two lengths only."""
    rng = random.Random(seed)
    shapes: list[tuple[str, int, int | None, str]] = []
    for s in seqlens[:2] if small else seqlens:
        shapes += [("gpt-oss", s, None, "bfloat16"), ("gpt-oss", s, 128, "bfloat16")]
        if not small:
            shapes += [("llama-70b", s, None, "bfloat16"), ("mimo-v2-flash", s, 128, "bfloat16")]
    if not small:
        shapes.append(("qwen2.5-7b", 4224, 256, "float16"))
    rows = [r for model, s, window, dtype in shapes for pass_ in ("fwd", "bwd_dq", "bwd_dkdv", "bwd")
            for r in case_rows(case(model, pass_, s, window, dtype), rng)]
    # a case nothing of ours survives, and one the run stopped before
    dead = case("gpt-oss", "fwd", 64, 16)
    rows += [row(dead, config=tile(64, 64), status="crashed", message="worker died: signal 9"),
             row(dead, config=tile(64, 32), status="crashed", message="worker died: signal 9"),
             row(dead, config=tile(32, 32), status="runtime_error", message="CUDA error: an illegal memory access"),
             row(dead, "eager", ms=0.05)]
    rows.append(row(case("gpt-oss", "bwd", 64, 16), "eager", ms=0.09))
    return rows


def write_run(run_dir: Path, rows: list[dict[str, Any]], env: dict[str, Any] | None = None) -> Path:
    """A run directory as ``sweeps.store`` leaves it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "trials.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (run_dir / "env.json").write_text(json.dumps(env or ENV))
    (run_dir / "spec.yaml").write_text("name: synthetic\n")
    return run_dir
