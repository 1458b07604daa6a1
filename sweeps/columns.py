"""Names shared by everything that writes or reads a run: statuses of a row and columns of results.csv."""

from __future__ import annotations

STATUSES = ("ok", "rejected", "duplicate", "compile_error", "out_of_resources", "oom", "runtime_error", "crashed",
            "timeout", "incorrect", "unavailable", "unsupported")

# Passes that a caller has; the others are parts of a backward.
WHOLE_PASSES = ("fwd", "bwd", "fwd_bwd")

# Outputs of each pass, in the order of the rel_err columns.
OUTPUTS = {
    "fwd": ("o", "lse"),
    "bwd_dq": ("dq", "dsinks"),
    "bwd_dkdv": ("dk", "dv"),
    "bwd": ("dq", "dk", "dv", "dsinks"),
    "fwd_bwd": ("o", "lse", "dq", "dk", "dv", "dsinks"),
}

COLUMNS = (
    "gpu", "model", "case", "impl", "pass", "dtype", "batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "head_dim",
    "head_dim_v", "window", "varlen", "deterministic", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "config",
    "seed", "status", "message", "note", "latency_ms", "latency_ms_p20", "latency_ms_p80", "wall_ms", "tflops",
    "pct_peak", "gb_per_s", "peak_memory_bytes", "rel_err_o", "rel_err_lse", "rel_err_dq", "rel_err_dk", "rel_err_dv",
    "rel_err_dsinks", "registers", "spills", "shared_bytes", "compile_s", "sm_clock_mhz", "power_w", "temperature_c",
    "samples", "stop_reason", "speedup_vs_eager", "speedup_vs_flash", "speedup_vs_default",
    "overlapped",
)
