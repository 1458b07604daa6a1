"""How kernels run in a process: in the interpreter without a GPU, and never when it is only to compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

from flash_sink_attn._mode import interpreter_problem

ROOT = Path(__file__).resolve().parent.parent

# One query on one key without a sink: the output is that key's value.
ATTEND = """
q, k, v = (torch.full((1, 1, 1, 16), x, dtype=torch.float16) for x in (1.0, 2.0, 3.0))
assert flash_sink_attn.flash_sink_attn_func(q, k, v).tolist() == v.tolist()
"""
STATE = """
from flash_sink_attn import _mode
print(_mode.INTERPRETING, _mode.COMPILE_ONLY, torch.cuda.is_initialized())
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process without a GPU, whose environment says nothing about the mode but ``environment``."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLASH_SINK_ATTN_COMPILE_ONLY")}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # something may be found by it
    env |= {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


needs_interpreter = pytest.mark.skipif(
    interpreter_problem(triton.__version__, numpy.__version__) is not None,
    reason="this Triton's interpreter cannot work with this NumPy")


@needs_interpreter
def test_without_a_gpu_kernels_are_interpreted() -> None:
    done = python("import torch, flash_sink_attn\n" + STATE + ATTEND)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False"]


@needs_interpreter
def test_triton_imported_before_is_interpreted_all_the_same() -> None:
    """Its own helpers were compiled functions by then."""
    code = "import torch, triton, triton.language as tl\nassert type(tl.max).__name__ == 'JITFunction'\n"
    done = python(code + "import flash_sink_attn\n" + STATE + ATTEND)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False"]


def test_triton_interpret_0_is_obeyed() -> None:
    done = python("import torch, flash_sink_attn\n" + STATE + ATTEND, TRITON_INTERPRET="0")
    assert done.stdout.split() == ["False", "False", "False"]
    assert done.returncode != 0 and "Error" in done.stderr  # a kernel that is to run on a GPU, and there is none


@pytest.mark.parametrize("before", ["", "import triton\n"])
def test_compile_only_never_interprets_and_touches_no_gpu(before: str) -> None:
    done = python(before + "import torch, flash_sink_attn\n" + STATE, FLASH_SINK_ATTN_COMPILE_ONLY="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True", "False"]


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [("3.6.0", "2.4.0", False), ("3.4.0", "2.10.1", False), ("3.6.0", "2.3.5", True), ("3.6.0", "1.26.4", True),
     ("3.7.0", "2.4.0", True), ("3.9.0", "2.4.1", True), ("3.10.0", "3.0.0", True)],
)
def test_numpy_too_new_for_the_interpreter(triton_version: str, numpy_version: str, works: bool) -> None:
    problem = interpreter_problem(triton_version, numpy_version)
    assert (problem is None) == works
    if problem is not None:
        assert triton_version in problem and numpy_version in problem and "pip install 'numpy<2.4'" in problem


# Neither version need be installed: what counts is what the modules say of themselves.
TOO_NEW = "import numpy, triton\nnumpy.__version__, triton.__version__ = '2.4.0', '3.6.0'\nimport torch\n"


def test_numpy_too_new_is_one_clear_error_at_the_first_call() -> None:
    """And the sweep says beforehand that our kernels are not available."""
    sweep = "from sweeps.registry import load\nprint(load('triton').unavailable())\n"
    done = python(TOO_NEW + "import flash_sink_attn\n" + sweep + ATTEND)
    problem = interpreter_problem("3.6.0", "2.4.0")
    assert done.stdout.strip() == problem, done.stderr
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == f"ImportError: {problem}"


def test_numpy_plays_no_part_where_nothing_is_interpreted() -> None:
    code = TOO_NEW + "from flash_sink_attn import _mode\nprint(_mode.PROBLEM)"
    assert python(code, FLASH_SINK_ATTN_COMPILE_ONLY="1").stdout.strip() == "None"
