"""Launches that were recorded, done again on other tensors of the same shapes: the short way from a call to the GPU.

What a launch costs the host is mostly work whose result is the same each time: which grid, which strides, which
constants, which compiled kernel. A :class:`Tape` holds all of that and fills in addresses. Where the installed Triton's
launcher is the one this was written for, it hands the addresses to the launcher's C function itself and encodes a
tensor map only for an address it has not seen; otherwise, and whenever somebody listens to launches (Triton's launch
hooks, which profilers use), it goes through ``CompiledKernel.__getitem__``, which any Triton has.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from flash_sink_attn._mode import triton

# Sources of an address besides the call's tensors, which count from 0: the arenas that hold temporaries.
WORKSPACE, ZEROED = -2, -1
# Tensor maps kept per descriptor: a training step meets the same few addresses again and again.
_MAPS = 256


class Address(NamedTuple):
    """Of an argument: the tensor (its number among the call's, or an arena) and bytes from its first element."""

    source: int
    offset: int


class _At:
    """As much of a tensor as a descriptor's base needs when it is launched."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Descriptor:
    """A tensor descriptor among the arguments: at which address, and what it was when it was recorded."""

    def __init__(self, at: Address, recorded: Any) -> None:
        self.at = at
        self.template = copy.copy(recorded)
        self.template.base = None  # or the recorded tensor would stay alive

    def made(self, address: int) -> Any:
        """The descriptor at another address; Triton's own checks were done when it was recorded."""
        found = object.__new__(type(self.template))
        found.__dict__.update(self.template.__dict__, base=_At(address))
        return found


class Step:
    """One launch."""

    def __init__(self, compiled: Any, programs: int, arguments: list[Any]) -> None:
        self.compiled, self.programs, self.arguments = compiled, programs, arguments
        self._direct: _Direct | None | bool = False  # not looked yet

    @property
    def direct(self) -> _Direct | None:
        """The launcher's C function with all but the addresses filled in; None where this Triton's is another one."""
        if self._direct is False:
            self._direct = _direct(self)
        return self._direct  # type: ignore[return-value]

    def listened(self, addresses: Sequence[int]) -> None:
        """Launch through Triton's public way, where its hooks hear of it."""
        filled = [addresses[x.source] + x.offset if isinstance(x, Address)
                  else x.made(addresses[x.at.source] + x.at.offset) if isinstance(x, Descriptor) else x
                  for x in self.arguments]
        self.compiled[self.programs, 1, 1](*filled)


class Tape:
    """The launches of one call.

    Args:
        steps: in order.
        device: of the tensors.
        workspace, zeroed: bytes of temporaries that need no value, and that must be zero.
    """

    def __init__(self, steps: Sequence[Step], device: torch.device, workspace: int, zeroed: int) -> None:
        self.steps, self.device = tuple(steps), device
        self.workspace, self.zeroed = workspace, zeroed

    def play(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Launch on these tensors; False, with nothing launched, where one is not aligned to 16 bytes."""
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        every = 0
        for address in addresses:
            every |= address
        if every & 15:
            return False
        # the arenas stay alive until everything is enqueued; the allocator then hands them out in stream order
        first = second = None
        if self.workspace:
            first = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
        if self.zeroed:
            second = torch.zeros(self.zeroed, dtype=torch.uint8, device=self.device)
        addresses += (0 if first is None else first.data_ptr(), 0 if second is None else second.data_ptr())
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self._launch(addresses)
        else:
            self._launch(addresses)
        return True

    def _launch(self, addresses: list[int]) -> None:
        quiet = not _somebody_listens()
        for step in self.steps:
            direct = step.direct if quiet else None
            if direct is None:
                step.listened(addresses)
            else:
                direct.launch(addresses)


def _somebody_listens() -> bool:
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


class _Direct:
    """A call of the C function that Triton 3.6 generates for a kernel's signature.

    Its arguments are the grid, the stream, the function, two flags, two scratch buffers, the packed metadata, what
    hooks are told and the hooks, then the kernel's own, in which a descriptor stands as a tensor map, its shape and
    its strides.
    """

    __slots__ = ("arguments", "function", "maps", "pointers", "stream")

    def __init__(
        self, function: Callable[..., None], arguments: list[Any], pointers: list[tuple[int, int, int]],
        maps: list[tuple[int, int, int, dict[int, Any], Callable[[int], Any]]], stream: Callable[[], int],
    ) -> None:
        self.function, self.arguments, self.pointers = function, arguments, pointers
        self.maps, self.stream = maps, stream

    def launch(self, addresses: list[int]) -> None:
        arguments = self.arguments.copy()
        for position, source, offset in self.pointers:
            arguments[position] = addresses[source] + offset
        for position, source, offset, known, encode in self.maps:
            address = addresses[source] + offset
            found = known.get(address)
            if found is None:
                if len(known) >= _MAPS:
                    known.clear()
                found = known[address] = encode(address)
            arguments[position] = found
        arguments[3] = self.stream()
        self.function(*arguments)


class Launcher(NamedTuple):
    """What of Triton's launcher of one kernel a direct launch needs.

    Attributes:
        function: the C function.
        cooperative, dependent: its two flags.
        stream: the current stream.
        encoder: for a descriptor and its number among the kernel's, what makes a tensor map of an address.
    """

    function: Callable[..., None]
    cooperative: bool
    dependent: bool
    stream: Callable[[], int]
    encoder: Callable[[Descriptor, int], Callable[[int], Any]]


def _direct(step: Step) -> _Direct | None:
    """The short way for a kernel, None where there is none."""
    compiled, launcher = step.compiled, launcher_of(step.compiled)
    if launcher is None:
        return None
    arguments: list[Any] = [step.programs, 1, 1, 0, compiled.function, launcher.cooperative, launcher.dependent, None,
                            None, compiled.packed_metadata, None, None, None]
    pointers: list[tuple[int, int, int]] = []
    maps: list[tuple[int, int, int, dict[int, Any], Callable[[int], Any]]] = []
    for x in step.arguments:
        if isinstance(x, Address):
            pointers.append((len(arguments), x.source, x.offset))
            arguments.append(0)
        elif isinstance(x, Descriptor):
            maps.append((len(arguments), x.at.source, x.at.offset, {}, launcher.encoder(x, len(maps))))
            arguments += (None, *x.template.shape, *x.template.strides)
        else:
            arguments.append(x)
    return _Direct(launcher.function, arguments, pointers, maps, launcher.stream)


_BASE = "iiiKKppOOOOOO"  # the C function's own arguments in Triton 3.6, as it names their formats


def launcher_of(compiled: Any) -> Launcher | None:
    """The launcher of a compiled kernel, None unless everything about it is as in Triton 3.6."""
    with contextlib.suppress(Exception):  # whatever is not as expected: there is the long way
        from triton.backends.nvidia import driver as nvidia

        run, described = compiled.run, getattr(compiled.metadata, "tensordesc_meta", None) or []
        if (nvidia._BASE_ARGS_FORMAT != _BASE or type(run) is not nvidia.CudaLauncher or run.global_scratch_size
                or run.profile_scratch_size or any(meta is None for meta in described)):
            return None
        function = run.launch
        if (inside := getattr(function, "__closure__", None)) is not None:  # wrapped, to expand descriptors
            function = inside[function.__code__.co_freevars.index("launcher")].cell_contents
        if type(function).__name__ != "builtin_function_or_method":
            return None
        active = triton.runtime.driver.active
        device, get = active.get_current_device(), active.get_current_stream

        def encoder(descriptor: Descriptor, number: int) -> Callable[[int], Any]:
            return lambda address: nvidia.make_tensordesc_arg(descriptor.made(address), described[number])[0]

        return Launcher(function, run.launch_cooperative_grid, run.launch_pdl, lambda: get(device), encoder)
    return None
