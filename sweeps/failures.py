"""What an exception means for its row: a status, and a message that fits a table and names no path of this machine."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_COMPILER_ERRORS = {"CompilationError", "PTXASError", "CompileTimeAssertionFailure", "UnsupportedLanguageConstruct"}
_COMPILER_WORDS = ("PassManager::run failed", "failed to translate module", "Internal Triton PTX codegen error")
_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "STATUS_ALLOC_FAILED")


def classify(error: BaseException, *, building: bool = False) -> str:
    """The status of a row that ended with ``error``.

    One of out_of_resources, oom, compile_error, unsupported and runtime_error.

    Args:
        building: the error came from the compiler's own process, where everything else is a compile_error.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    if "OutOfResources" in names or text.startswith("out of resource:"):
        return "out_of_resources"
    if building:
        return "compile_error"
    if "Unsupported" in names:  # sweeps.baselines.common: a peer that declines only once it is asked
        return "unsupported"
    if names & {"OutOfMemoryError", "MemoryError"} or any(words in text for words in _MEMORY_WORDS):
        return "oom"
    if names & _COMPILER_ERRORS or any(words in text for words in _COMPILER_WORDS):
        return "compile_error"
    return "runtime_error"


def message(error: BaseException, limit: int = 700) -> str:
    """``Type: text`` and where it was raised, on one line of at most about ``limit`` characters."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{frames[-1].filename}:{frames[-1].lineno}]" if frames else ""
    return shorten(text, limit) + without_paths(where)


def shorten(text: str, limit: int = 700) -> str:
    """One line without this machine's paths; what is too long loses its middle, since errors end with their cause."""
    line = " ".join(without_paths(text).split())
    if len(line) <= limit:
        return line
    head = limit * 2 // 5
    return f"{line[:head]} ... {line[head - limit + 5:]}"


def without_paths(text: str) -> str:
    """``text`` with the directories that differ from machine to machine cut off."""
    roots = {str(_ROOT): "", str(Path.cwd()): "", sys.prefix: "python", sys.base_prefix: "python",
             tempfile.gettempdir(): "tmp", str(Path.home()): "~"}
    for root in sorted(roots, key=len, reverse=True):
        if len(root) > 1:
            text = text.replace(root + "/", f"{roots[root]}/" if roots[root] else "")
    return text
