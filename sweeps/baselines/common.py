"""What the peers share: their declared limits, and how a pass is made from a forward and a backward.

Every peer's forward and backward speak our layouts (see :class:`sweeps.implementation.Inputs`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from sweeps.cases import Case
from sweeps.columns import OUTPUTS
from sweeps.implementation import Inputs, Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from flash_sink_attn.flash_attn_with_sink import FlashAttention

Results = dict[str, Any]

RETAINED_GRAPH = "backward = autograd.grad on a graph kept from one forward, which is not timed"


class Unsupported(NotImplementedError):
    """Raised by ``prepare`` when only the installed version could tell that it cannot do the case."""


class Peer:
    """Base of the peers. A subclass states its limits as class attributes and implements ``prepare``.

    Attributes:
        distributions: installed packages whose version belongs to the row's key.
        known_options: what the YAML may give it.
        passes, windows, varlen, fewer_queries, unequal_head_dims, no_sinks: what it can do.
        max_head_dim: the largest head dim.
    """

    name: str = ""
    is_flash: bool = False
    needs_cuda: ClassVar[bool] = True
    distributions: ClassVar[tuple[str, ...]] = ()
    known_options: ClassVar[tuple[str, ...]] = ()
    passes: ClassVar[tuple[str, ...]] = ("fwd", "bwd", "fwd_bwd")
    windows: ClassVar[bool] = True
    varlen: ClassVar[bool] = True
    fewer_queries: ClassVar[bool] = True
    unequal_head_dims: ClassVar[bool] = True
    no_sinks: ClassVar[bool] = True
    max_head_dim: ClassVar[int] = 256

    def __init__(self, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(self.known_options))
        if unknown:
            raise ValueError(f"{self.name}: option {unknown[0]!r} is unknown, expected one of "
                             f"{list(self.known_options)}")
        self.options = dict(options)

    def check_installed(self) -> None:
        """Imports what ``prepare`` will need; whatever it raises becomes the reason of ``unavailable``."""

    def unavailable(self) -> str | None:
        if self.needs_cuda:
            import torch
            if not torch.cuda.is_available():
                return f"{self.name} needs a CUDA device, this machine has none"
        try:
            self.check_installed()
        except Exception as error:  # noqa: BLE001  # a wheel for another torch, CUDA or Python fails in many ways
            return f"{type(error).__name__}: {error}"
        return None

    def unsupported(self, case: Case) -> str | None:
        if case.pass_ in ("bwd_dq", "bwd_dkdv"):
            return f"{case.pass_}: parts of the backward are swept for our own kernels only"
        if case.pass_ not in self.passes:
            return f"{self.name} has no pass {case.pass_!r}, only {', '.join(self.passes)}"
        if case.seqlen_q > case.seqlen_k:
            return f"more queries ({case.seqlen_q}) than keys ({case.seqlen_k}) leaves rows without a visible key"
        limits = (
            (visible_window(case) is not None and not self.windows, f"window {case.window}"),
            (bool(case.varlen) and not self.varlen, "varlen batches"),
            (case.seqlen_q < case.seqlen_k and not self.fewer_queries, "fewer queries than keys (bottom-right causal)"),
            (case.head_dim != case.head_dim_v and not self.unequal_head_dims,
             f"a value head dim ({case.head_dim_v}) other than the query's ({case.head_dim})"),
            (max(case.head_dim, case.head_dim_v) > self.max_head_dim, f"head dims above {self.max_head_dim}"),
            (not case.sinks and not self.no_sinks, "attention without sinks"),
        )
        return next((f"{self.name} does not support {what}" for failed, what in limits if failed), None)

    def versions(self) -> dict[str, str]:
        found = {f"option_{n}": str(v) for n, v in sorted(self.options.items()) if n != "path"}
        for distribution in self.distributions:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[distribution] = metadata.version(distribution)
        return found

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        return [{}]

    def rejected(self, case: Case, config: Mapping[str, Any], arch: int) -> str | None:
        return f"{self.name} has no tunables, got {dict(config)}" if config else None

    def compile(self, case: Case, config: Mapping[str, Any], arch: int) -> dict[str, Any]:
        return {}

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        raise NotImplementedError


def visible_window(case: Case) -> int | None:
    """The case's window, None where it is so wide that it hides nothing."""
    return None if case.window is None or case.window >= case.seqlen_k else case.window


def prepare_passes(case: Case, forward: Callable[[], Results], backward: Callable[[Results], Results] | None, *,
                   note: str = "", applies_sink: bool = True, deterministic: bool | None = None) -> Prepared:
    """The case's pass from a forward and a backward that allocate their own outputs.

    Args:
        forward: returns o and, where there is one, lse; further entries are handed to ``backward`` untouched.
        backward: turns a forward's results into dq, dk, dv and dsinks; None for a peer without one.
        deterministic: of the backward; a forward is taken to be deterministic, as none of the peers' adds atomically.

    For ``bwd`` the forward runs here, once. The pass itself also runs here once, so that nothing is left to compile;
    its results are dropped.
    """
    results: Results = {}
    run: Callable[[], None]
    if case.pass_ == "fwd":
        def run() -> None:
            results.update(forward())
    else:
        if backward is None:
            raise Unsupported(f"no backward for pass {case.pass_!r}")
        if case.pass_ == "bwd":
            saved = forward()

            def run() -> None:
                results.update(backward(saved))
        else:
            def run() -> None:
                made = forward()
                results.update(made)
                results.update(backward(made))
    run()
    results.clear()
    return Prepared(run=run, outputs=lambda: {n: results[n] for n in OUTPUTS[case.pass_] if results.get(n) is not None},
                    note=note, applies_sink=applies_sink,
                    deterministic=True if case.pass_ == "fwd" else deterministic)


def prepare_autograd(case: Case, inputs: Inputs, attention: Callable[..., tuple[Tensor, Tensor | None]], *,
                     note: str = "", deterministic: bool | None = None) -> Prepared:
    """The case's pass from a differentiable ``attention(q, k, v, sinks) -> (o, lse or None)``."""
    import torch

    given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "sinks": inputs.sinks}
    leaves = {n: t.detach().requires_grad_() for n, t in given.items() if t is not None}

    def forward() -> Results:
        if case.pass_ == "fwd":
            with torch.no_grad():
                o, lse = attention(*given.values())
        else:
            with torch.enable_grad():
                o, lse = attention(*(leaves.get(n) for n in given))
        return {"o": o, "lse": lse}

    def backward(made: Results) -> Results:
        gradients = torch.autograd.grad(made["o"], list(leaves.values()), inputs.do, retain_graph=True)
        return {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    return prepare_passes(case, forward, backward, note=note, deterministic=deterministic)


def prepare_with_sink_on_top(
    case: Case, inputs: Inputs, forward: Callable[[], tuple[Tensor, Tensor, Any]],
    backward: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor, Tensor]] | None, *,
    note: str = "", deterministic: bool | None = None,
) -> Prepared:
    """The case's pass from a kernel that knows no sink but returns its lse and takes one in its backward.

    Args:
        forward: () -> (o, lse, anything the backward needs), without the sink.
        backward: (o, lse, that anything) -> (dq, dk, dv), for the output and lse it is handed; None = has none.
    """
    import torch

    from flash_sink_attn.flash_attn_with_sink import apply_sink, sink_gradient

    sinks = inputs.sinks
    add_sink, dsinks = fused(apply_sink, inputs.q.device.type), fused(sink_gradient, inputs.q.device.type)

    @torch.no_grad()
    def make() -> Results:
        o, lse, rest = forward()
        if sinks is not None:
            o, lse = add_sink(o, lse, sinks)
        return {"o": o, "lse": lse, "rest": rest}

    @torch.no_grad()
    def differentiate(made: Results) -> Results:
        assert backward is not None
        dq, dk, dv = backward(made["o"], made["lse"], made["rest"])
        results = {"dq": dq, "dk": dk, "dv": dv}
        if sinks is not None:
            results["dsinks"] = dsinks(made["o"], inputs.do, made["lse"], sinks)
        return results

    parts = [note] if note else []
    if sinks is not None:
        if case.pass_ != "bwd":
            parts.append("sink applied by one fused elementwise kernel, o * sigmoid(lse - sink), counted")
        if case.pass_ != "fwd":
            parts.append("backward given the output with the sink and logaddexp(lse, sink); "
                         "dsinks by a fused reduction, counted")
    return prepare_passes(case, make, None if backward is None else differentiate, note="; ".join(parts),
                          deterministic=deterministic)


def prepare_flash(flash: FlashAttention, case: Case, inputs: Inputs, deterministic: bool, note: str = "") -> Prepared:
    """The case's pass from an installed FlashAttention without sinks, the sink on top."""
    from flash_sink_attn.flash_attn_with_sink import FlashCall

    q, k, v, window = inputs.q, inputs.k, inputs.v, visible_window(case)
    call = FlashCall(softmax_scale=inputs.softmax_scale, causal=True,
                     window_size=(-1, -1) if window is None else (window - 1, 0), deterministic=deterministic,
                     cu_seqlens=inputs.cu_seqlens, max_seqlen=inputs.max_seqlen)

    def backward(o: Tensor, lse: Tensor, rng_state: Any) -> tuple[Tensor, Tensor, Tensor]:
        return flash.backward(inputs.do, q, k, v, o, lse, call, rng_state)

    return prepare_with_sink_on_top(case, inputs, lambda: flash.forward(q, k, v, call), backward, note=note,
                                    deterministic=deterministic)


@functools.cache
def fused(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """``function`` compiled on CUDA; elsewhere as it is."""
    if device_type != "cuda":
        return function
    import torch

    allow_recompiles()
    return torch.compile(function, dynamic=False, fullgraph=True)


def allow_recompiles() -> None:
    """A worker sees many shapes; beyond its limit of 8 torch.compile would silently run eagerly."""
    from torch._dynamo import config

    for limit in ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit"):
        if hasattr(config, limit):
            setattr(config, limit, 10_000)


def configured_path(name: str, options: Mapping[str, Any], what: str) -> Path:
    """The option ``path`` of a peer that is loaded from the user's own copy.

    Raises:
        FileNotFoundError: no path configured, or nothing lies there.
    """
    path = options.get("path")
    if not path:
        raise FileNotFoundError(f"no `path:` configured for {name}; it must point to {what}")
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"{name}: path: expected {what}, got {found}, which does not exist")
    return found


def load_file(alias: str, file: Path, *, stand_ins: Mapping[str, ModuleType] | None = None) -> ModuleType:
    """Imports ``file`` as the module ``alias``, once.

    ``stand_ins`` are put in place of modules that the file imports but which are not installed, during the import.
    """
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    absent = {name: stand_in for name, stand_in in (stand_ins or {}).items()
              if name not in sys.modules and importlib.util.find_spec(name) is None}
    sys.modules.update({alias: module, **absent})
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[alias]
        raise
    finally:
        for name in absent:
            sys.modules.pop(name, None)
    return module


def hash_files(files: Iterable[Path]) -> str:
    """A short hash of the files' contents, in sorted order."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
