"""A hash of the kernels' code, so that a tuned entry can say which kernels it was measured on."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from flash_sink_attn.config import KERNELS_OF, Impl, Kernel

# Where each implementation's kernels lie, and which modules there run on the host.
_FOLDER: dict[Impl, str] = {"triton": "kernels", "hopper": "hopper"}
_HOST_SIDE = ("launch.py", "launch_forward.py", "launch_backward.py", "sections.py", "support.py", "__init__.py")
# Under which name a run's facts have the hash.
CODE_FIELD: dict[Impl, str] = {"triton": "kernel_code", "hopper": "hopper_kernel_code"}


def impl_of(kernel: Kernel) -> Impl:
    """Whose kernel it is."""
    return next(impl for impl, of in KERNELS_OF.items() if any(kernel in kernels for kernels in of.values()))


@cache
def kernel_code_hash(impl: Impl = "triton") -> str:
    """Twelve hex digits over the code of one implementation that runs on the GPU: its modules without the launchers.

    Comments, docstrings and line breaks play no part, nor does the Python version that reads them.
    """
    root = Path(__file__).resolve().parent / _FOLDER[impl]
    files = sorted(path for path in root.rglob("*.py") if path.name not in _HOST_SIDE)
    text = "\n".join(f"{path.relative_to(root).as_posix()} {code_text(path.read_text())}" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_text(source: str) -> str:
    """The syntax tree of a module as text, without docstrings and positions; equal for equal code."""
    return _dump(ast.parse(source))


def _dump(node: Any) -> str:
    if isinstance(node, list):
        return "[" + ",".join(map(_dump, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # what is absent or empty is left out: newer Pythons know fields that older ones do not
    fields = {name: _body(node, value) if name == "body" else value for name, value in ast.iter_fields(node)
              if name not in ("kind", "type_comment")}
    inside = ",".join(f"{name}={_dump(value)}" for name, value in fields.items() if value is not None and value != [])
    return f"{type(node).__name__}({inside})"


def _body(node: ast.AST, body: Any) -> Any:
    documented = isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    return body[1:] if documented and ast.get_docstring(node, clean=False) is not None else body  # type: ignore[arg-type]
