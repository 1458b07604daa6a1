"""The one way to launch a kernel: compiled once per kind of arguments, recorded where a call is to be replayed.

A host function says what to launch with :func:`launch` and takes its temporaries from :func:`workspace`. Under
:func:`recording` all of that is noted down with the places of the tensors in it, and the :class:`Tape` that results
does the same launches on other tensors of the same shapes, strides and dtypes without any of the host function's work:
see flash_sink_attn.replay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from flash_sink_attn.kernel_cache import settle_key
from flash_sink_attn.replay import WORKSPACE, ZEROED, Address, Descriptor, Step, Tape

logger = logging.getLogger("flash_sink_attn")

_compiled: dict[tuple[Any, ...], Any] = {}  # -> the compiled kernel, or None for a faulty one
_ALIGNMENT = 256  # of temporaries that share an allocation; what PyTorch's allocator aligns to is more


class MiscompiledError(Exception):
    """The machine code of a kernel is not what its source says: see flash_sink_attn.machine_code."""


def is_descriptor(x: Any) -> bool:
    """Whether a kernel's argument is a host-side tensor descriptor, Triton's or Gluon's."""
    return hasattr(x, "block_shape") and hasattr(x, "base")


def launch(
    kernel: Any, programs: int, device: torch.device, runtime: Sequence[Any], constants: Mapping[str, Any], *,
    num_warps: int, num_stages: int | None = None, maxnreg: int | None = None,
    check: Callable[[Any], str | None] | None = None, dependent: bool = False, cluster: int = 1,
) -> Any:
    """Launch on ``device`` (returns the compiled kernel, None when interpreted), or only compile on meta.

    Triton's own way from the arguments to a compiled kernel costs the host 50 us and more. Here it is a dictionary
    lookup by all that the kernel is specialised on: the constexprs, which of the other arguments are None, their
    dtypes, and that pointers are 16-byte aligned and integers 32 bits wide. What is not so takes Triton's way.

    Args:
        kernel: a Triton or Gluon function.
        programs: size of its grid, which has one dimension; with 0 nothing is launched.
        runtime: its arguments up to its first constexpr, in order: tensors, tensor descriptors, numbers, None.
        constants: its constexprs by name, in order.
        num_warps, num_stages, maxnreg: compile options; None = Triton's default.
        check: says of a kernel just compiled why it must not run, or None.
        dependent: whether its programs may start before those of the launch before it have ended, for whose results
            they wait themselves: see flash_sink_attn.hopper.common.
        cluster: so many neighbouring programs are launched together; ``programs`` is then the number of clusters. The
            kernel is compiled as any other, so that a program's number is its own. A kernel has one size of clusters.

    Raises:
        MiscompiledError: ``check`` said so, now or in an earlier launch.
    """
    compile_options = (num_warps, num_stages, maxnreg, dependent)
    settle_key(kernel)  # before anything looks it up: its hash is that key
    if device.type != "cuda":
        return _launch_new(kernel, programs, runtime, constants, _options(*compile_options), check, None,
                           warm_up_only=device.type == "meta")
    kinds: list[Any] = []
    plain, specialised = programs > 0, _specialised(kernel)
    for position, x in enumerate(runtime):
        if isinstance(x, torch.Tensor):
            kinds.append(x.dtype)
            plain = plain and not x.data_ptr() % 16
        elif isinstance(x, int):
            plain = plain and x < 2**31
            if position in specialised:
                kinds += (x == 1, x % 16 == 0)
        elif x is None:
            kinds.append(None)
        elif is_descriptor(x):
            kinds += (x.base.dtype, *x.block_shape, getattr(x, "layout", None))
    key = (kernel, device.index, *compile_options, cluster, *kinds, *constants.values())
    # Triton launches on the current device
    away = device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if away else contextlib.nullcontext():
        if plain and key in _compiled:
            compiled = _compiled[key]
            if compiled is None:
                raise MiscompiledError
            compiled[programs, 1, 1](*runtime, *constants.values())
            _note(compiled, programs, runtime, constants)
            return compiled
        return _launch_new(kernel, programs, runtime, constants, _options(*compile_options), check,
                           key if plain else None, cluster=cluster)


@functools.cache
def _specialised(kernel: Any) -> frozenset[int]:
    """Positions of the arguments of which Triton compiles a kernel of their own where they are 1 or multiples of 16."""
    return frozenset(i for i, p in enumerate(getattr(kernel, "params", ())) if not p.do_not_specialize)


def _options(num_warps: int, num_stages: int | None, maxnreg: int | None, dependent: bool) -> dict[str, int]:
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "launch_pdl": dependent or None}
    return {name: value for name, value in options.items() if value is not None}


def _launch_new(
    kernel: Any, programs: int, runtime: Sequence[Any], constants: Mapping[str, Any], options: dict[str, int],
    check: Callable[[Any], str | None] | None, key: tuple[Any, ...] | None, warm_up_only: bool = False,
    cluster: int = 1,
) -> Any:
    arguments = {**dict(zip(kernel.arg_names, runtime, strict=False)), **constants}
    if warm_up_only:
        return kernel.warmup(**arguments, **options, grid=(programs,))
    if not programs:
        return None
    if check is not None:
        compiled = kernel.warmup(**arguments, **options, grid=(programs,))
        if fault := check(compiled):
            if key is not None:
                _compiled[key] = None
            raise MiscompiledError(fault)
    if cluster == 1:
        compiled = kernel[(programs,)](**arguments, **options)
    else:
        compiled = kernel.warmup(**arguments, **options, grid=(programs,))
        # what Triton's launcher takes the size of a cluster from, and multiplies the grid by
        num_warps, _, *others = compiled.packed_metadata
        compiled.packed_metadata = (num_warps, cluster, *others)
        compiled[programs, 1, 1](*runtime, *constants.values())
    if key is not None:
        _compiled[key] = compiled
    _note(compiled, programs, runtime, constants)
    return compiled


# ----------------------------------------------------------------------------------------------------- recording


@dataclasses.dataclass
class Recorder:
    """What a host function did, as far as it can be done again.

    Attributes:
        problem: why it cannot be replayed, None = it can.
    """

    sources: list[torch.Tensor | None]
    device: torch.device
    steps: list[Step] = dataclasses.field(default_factory=list)
    problem: str | None = None
    _buffers: list[tuple[torch.Tensor, int, int]] = dataclasses.field(default_factory=list)  # tensor, arena, offset
    _bytes: dict[int, int] = dataclasses.field(default_factory=lambda: {WORKSPACE: 0, ZEROED: 0})

    def __post_init__(self) -> None:
        there = [id(x) for x in self.sources if x is not None]
        if len(there) != len(set(there)):
            self.problem = "one tensor is two arguments"

    def lend(self, x: torch.Tensor, zeroed: bool) -> None:
        """Note a temporary."""
        arena = ZEROED if zeroed else WORKSPACE
        self._buffers.append((x, arena, self._bytes[arena]))
        self._bytes[arena] += -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT

    def address(self, x: torch.Tensor) -> Address | None:
        """Where a tensor comes from: an argument itself, or a temporary or a view of one."""
        for index, source in enumerate(self.sources):
            if source is x:
                return Address(index, 0)
        for buffer, arena, offset in self._buffers:
            if buffer.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and buffer.numel():
                return Address(arena, offset + int(x.storage_offset()) * x.element_size())
        self.problem = self.problem or "a kernel's argument is neither an argument of the call nor a temporary"
        return None

    def note(self, compiled: Any, programs: int, runtime: Sequence[Any], constants: Mapping[str, Any]) -> None:
        """Note a launch."""
        if compiled is None:
            self.problem = "the kernels are interpreted"
            return
        places: list[Any] = []
        for x in runtime:
            if isinstance(x, torch.Tensor):
                places.append(self.address(x))
                if x.data_ptr() % 16:
                    self.problem = self.problem or "a tensor is not aligned to 16 bytes"
            elif is_descriptor(x):
                at = self.address(x.base)
                places.append(None if at is None else Descriptor(at, x))
            else:
                places.append(x)
        if self.problem is None:
            self.steps.append(Step(compiled, programs, [*places, *constants.values()]))

    def tape(self) -> Tape | None:
        """The recording, None where what was done cannot be replayed."""
        if self.problem is not None:
            return None
        return Tape(self.steps, self.device, self._bytes[WORKSPACE], self._bytes[ZEROED])


# The backward runs in a thread of autograd's own.
_current = threading.local()


@contextlib.contextmanager
def recording(sources: Sequence[torch.Tensor | None], device: torch.device) -> Iterator[Recorder]:
    """Note down the launches inside the ``with``.

    Args:
        sources: the tensors that differ from call to call, in the order in which :meth:`Tape.play` takes them.
        device: where temporaries live.
    """
    recorder = Recorder(list(sources), device)
    outer, _current.recorder = getattr(_current, "recorder", None), recorder
    try:
        yield recorder
    finally:
        _current.recorder = outer


def _note(compiled: Any, programs: int, runtime: Sequence[Any], constants: Mapping[str, Any]) -> None:
    recorder = getattr(_current, "recorder", None)
    if recorder is not None:
        recorder.note(compiled, programs, runtime, constants)


def workspace(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, zero: bool = False) -> torch.Tensor:
    """A temporary of the call; a recorded call is given one again when it is replayed, ``zero`` = full of zeros."""
    recorder = getattr(_current, "recorder", None)
    size = math.prod(shape) * dtype.itemsize
    if recorder is None or device.type == "meta" or not size:
        return (torch.zeros if zero else torch.empty)(tuple(shape), dtype=dtype, device=device)
    x = (torch.zeros if zero else torch.empty)(tuple(shape), dtype=dtype, device=device)
    recorder.lend(x, zero)
    return x


def not_replayable(reason: str) -> None:
    """A host function did something that a recording does not hold."""
    recorder = getattr(_current, "recorder", None)
    if recorder is not None:
        recorder.problem = recorder.problem or reason
