"""How kernels run in this process: on a GPU, in Triton's interpreter, or not at all (compile only).

Imported before any kernel is defined, because ``triton.jit`` decides at decoration time.
"""

from __future__ import annotations

import os
import re
import sys

import torch

COMPILE_ONLY = os.environ.get("FLASH_SINK_ATTN_COMPILE_ONLY", "0") == "1"


def _enter_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" not in sys.modules:
        return
    # Somebody imported Triton first, so its own helpers (tl.max, tl.zeros, ...) are compiled functions, which the
    # interpreter cannot call. Without a GPU nobody else can be using them.
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    triton.knobs.runtime.interpret = True
    for module in (tl.standard, tl.math, tl):
        for name, value in vars(module).copy().items():
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


if not COMPILE_ONLY and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "0":
    _enter_interpreter()

import triton  # noqa: E402  (the order is the point of this module)

INTERPRETING: bool = triton.knobs.runtime.interpret


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def interpreter_problem(triton_version: str, numpy_version: str) -> str | None:
    """Why Triton's interpreter cannot run with this NumPy, and what to install; None where it can."""
    # NumPy 2.4 made int() of a one-element array an error, which the interpreter before Triton 3.7 calls everywhere.
    if _version(triton_version) >= (3, 7) or _version(numpy_version) < (2, 4):
        return None
    return (f"without a GPU the kernels run in Triton's interpreter, and that of Triton {triton_version} cannot work "
            f"with NumPy {numpy_version}: pip install 'numpy<2.4' or 'triton>=3.7'")


def _problem() -> str | None:
    if not INTERPRETING:
        return None
    try:
        import numpy
    except ImportError:
        return "without a GPU the kernels run in Triton's interpreter, which needs NumPy: pip install 'numpy<2.4'"
    return interpreter_problem(triton.__version__, numpy.__version__)


# Why no kernel can run in this process, or None.
PROBLEM: str | None = _problem()
