"""Our portable Triton kernels as implementations: their passes, tunables and calls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flash_sink_attn.config import PORTABLE, AttnConfig, Kernel, TileConfig, limits_of, reject_reason
from sweeps.cases import Case
from sweeps.implementation import Inputs, Prepared

if TYPE_CHECKING:
    import torch

    from flash_sink_attn.tuned_table import ShapeKey

# The kernels each pass launches, in order.
PARTS: dict[str, tuple[Kernel, ...]] = {
    "fwd": ("fwd",), "bwd_dq": ("bwd_dq",), "bwd_dkdv": ("bwd_dkdv",), "bwd": ("bwd_dq", "bwd_dkdv"),
    "fwd_bwd": ("fwd", "bwd_dq", "bwd_dkdv"),
}


class MiscompiledError(RuntimeError):
    """A kernel that was built and would compute wrong values; it must not be timed, and not be run."""


def tiles_of(case: Case, config: Mapping[str, Any]) -> AttnConfig:
    """A trial's config as an AttnConfig: flat for a pass of one kernel, else by kernel name; {} = heuristic."""
    parts = PARTS[case.pass_]
    if not config:
        return AttnConfig()
    if len(parts) == 1:
        return AttnConfig.from_dict({parts[0]: config})
    return AttnConfig.from_dict(config)


class Triton:
    """``impl`` triton: flash_sink_attn.kernels. Configurations are TileConfig fields; {} is the heuristic."""

    name = "triton"
    is_flash = False

    def unavailable(self) -> str | None:
        """None also without a GPU, where the kernels run in Triton's interpreter, unless NumPy is too new for it."""
        from flash_sink_attn import _mode

        return _mode.PROBLEM

    def unsupported(self, case: Case) -> str | None:
        """None: every case is within the kernels' range, which is checked when it is described."""
        return None

    def versions(self) -> dict[str, str]:
        """The package's version; the kernels' source hash is part of the environment."""
        import flash_sink_attn

        return {"flash_sink_attn": flash_sink_attn.__version__}

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        """A grid around what is known to be good, for a sweep that names no tiles."""
        if len(PARTS[case.pass_]) > 1:
            return []  # composed of its parts' winners
        grids = {"fwd": ((64, 128), (32, 64, 128)), "bwd_dq": ((64, 128), (32, 64, 128)),
                 "bwd_dkdv": ((32, 64), (64, 128))}[case.pass_]
        pack = (False, True) if case.pass_ == "fwd" and case.window and case.heads_q > case.heads_kv else (False,)
        split = (False, True) if case.window else (True,)
        return [TileConfig(m, n, w, s, PACK_GQA=p, SPLIT_LOOPS=x).to_dict()
                for m, n in itertools.product(*grids) for w, s, p, x in itertools.product((4, 8), (2, 3), pack, split)]

    def default_config(self, case: Case, arch: int) -> dict[str, Any]:
        """What the dispatcher's heuristic would use, in the form of a trial's config."""
        tiles: dict[str, dict[str, Any]] = {kernel: tile.to_dict() for kernel, tile in _tiles(case, {}, arch).items()}
        return tiles if len(tiles) > 1 else tiles[PARTS[case.pass_][0]]

    def rejected(self, case: Case, config: Mapping[str, Any], arch: int) -> str | None:
        """The launcher's own validity rule."""
        try:
            tiles = tiles_of(case, config)
        except ValueError as error:
            return str(error)
        for kernel in PARTS[case.pass_]:
            tile = getattr(tiles, kernel)
            reason = tile and reject_reason(tile, kernel, head_dim=case.head_dim, head_dim_v=case.head_dim_v,
                                            group=case.heads_q // case.heads_kv, limits=limits_of(arch))
            if reason:
                return f"{kernel}: {reason}" if len(PARTS[case.pass_]) > 1 else reason
        return None

    def compile(self, case: Case, config: Mapping[str, Any], arch: int) -> dict[str, Any]:
        """Build the pass's kernels; figures are the largest of them, except counts of instructions, their sum.

        Raises:
            MiscompiledError: the machine code of one of them overwrites an operand that it still needs.
        """
        import torch

        from flash_sink_attn.compile_only import compile_kernel

        varlen = bool(case.varlen)
        built = [compile_kernel(
            kernel, tile, dtype=getattr(torch, case.dtype), batch=case.batch,
            seqlen_q=sum(case.seqlens) if varlen else case.seqlen_q,
            seqlen_k=sum(case.seqlens) if varlen else case.seqlen_k, heads_q=case.heads_q, heads_kv=case.heads_kv,
            head_dim=case.head_dim, head_dim_v=case.head_dim_v, window=case.window, varlen=varlen, sinks=case.sinks,
            arch=arch) for kernel, tile in _tiles(case, config, arch).items()]
        if fault := next((b.fault for b in built if b.fault), None):
            raise MiscompiledError(f"the compiler made wrong machine code: {fault}")
        return {**{name: max(getattr(b, name) for b in built) for name in ("registers", "spills", "shared_bytes")},
                **{name: sum(getattr(b, name) for b in built) for name in ("hgmma", "tma", "local", "mufu",
                                                                           "instructions")},
                "cache_hit": all(b.cached for b in built), "binary": "-".join(b.binary for b in built)}

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        """Allocate the outputs and bind the launches; a backward runs its forward here, with the heuristic's tiles."""
        return _Call(case, config, inputs).prepared()


def _tiles(case: Case, config: Mapping[str, Any], arch: int) -> dict[Kernel, Any]:
    """The tile configuration of every kernel of the pass."""
    from flash_sink_attn.dispatch import heuristic

    chosen, key = tiles_of(case, config), shape_key(case)
    return {kernel: getattr(chosen, kernel) or heuristic(kernel, key, limits_of(arch)) for kernel in PARTS[case.pass_]}


def shape_key(case: Case) -> ShapeKey:
    """The tuned table's key of a case."""
    from flash_sink_attn.tuned_table import ShapeKey

    dims = (case.dtype, case.head_dim, case.head_dim_v, case.heads_q, case.heads_kv, case.window)
    if case.varlen:
        return ShapeKey.packed(*dims, sum(case.seqlens), case.seqlen_q, case.seqlen_k)
    return ShapeKey.fixed(*dims, case.batch, case.seqlen_q, case.seqlen_k)


class _Call:
    """The buffers and launches of one trial."""

    def __init__(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> None:
        import torch

        from flash_sink_attn.dispatch import device_info
        from flash_sink_attn.kernels.launch import row_statistics, sink_partials
        from flash_sink_attn.layout import Sequences

        self.case, self.i = case, inputs
        q, k, v, cu = inputs.q, inputs.k, inputs.v, inputs.cu_seqlens
        arch = device_info(q.device).arch
        whole = dataclasses.replace(case, pass_="fwd_bwd")
        self.tiles = _tiles(whole, {}, arch) | _tiles(case, config, arch)
        self.sequences = (Sequences(case.batch, q.shape[1], k.shape[1]) if cu is None
                          else Sequences(case.batch, q.shape[0], k.shape[0], cu))
        self.common: dict[str, Any] = {"sequences": self.sequences, "window": inputs.window,
                                       "scale": inputs.softmax_scale}
        lse_shape = (q.shape[1], q.shape[0]) if cu is not None else (q.shape[0], q.shape[2], q.shape[1])
        self.o = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.lse = q.new_empty(lse_shape, dtype=torch.float32)
        self.rows = row_statistics(q, self.sequences)
        self.partials = sink_partials(q, k, self.sequences, self.tiles["bwd_dq"]) if inputs.sinks is not None else None
        self.dq, self.dk, self.dv = (q.new_empty(x.shape) for x in (q, k, v))
        self.dsinks = None if inputs.sinks is None else torch.empty_like(inputs.sinks)
        self.compiled: Any = None

    def fwd(self) -> None:
        from flash_sink_attn.kernels.launch import forward

        i = self.i
        self.compiled = forward(i.q, i.k, i.v, i.sinks, self.o, self.lse, config=self.tiles["fwd"], **self.common)

    def bwd_dq(self) -> None:
        from flash_sink_attn.kernels.launch import backward_dq

        i = self.i
        self.compiled = backward_dq(i.q, i.k, i.v, i.sinks, self.o, self.lse, i.do, None, self.dq, self.rows,
                                    self.partials, config=self.tiles["bwd_dq"], **self.common)

    def bwd_dkdv(self) -> None:
        from flash_sink_attn.kernels.launch import backward_dkdv

        i = self.i
        self.compiled = backward_dkdv(i.q, i.k, i.v, self.rows, i.do, self.dk, self.dv, self.partials,
                                      self.dsinks, config=self.tiles["bwd_dkdv"], **self.common)

    def prepared(self) -> Prepared:
        launches: dict[Kernel, Callable[[], None]] = {k: getattr(self, k) for k in PORTABLE}
        parts = PARTS[self.case.pass_]
        for earlier in PORTABLE[:PORTABLE.index(parts[0])]:
            launches[earlier]()

        def run() -> None:
            for kernel in parts:
                launches[kernel]()

        resources: list[dict[str, int]] = []
        for kernel in parts:
            launches[kernel]()
            if self.compiled is not None:
                resources.append({"registers": self.compiled.n_regs, "spills": self.compiled.n_spills,
                                  "shared_bytes": self.compiled.metadata.shared})
        largest = {name: max(r[name] for r in resources) for name in resources[0]} if resources else {}
        return Prepared(run=run, outputs=self._outputs, poison=self._poison, deterministic=True, resources=largest)

    def _owned(self) -> dict[str, torch.Tensor | None]:
        """The buffers each kernel of the pass writes, which may be poisoned before a run."""
        owned: dict[Kernel, dict[str, torch.Tensor | None]] = {
            "fwd": {"o": self.o, "lse": self.lse},
            "bwd_dq": {"dq": self.dq, "rows": self.rows, "partials": self.partials},
            "bwd_dkdv": {"dk": self.dk, "dv": self.dv, "dsinks": self.dsinks},
        }
        return {name: x for kernel in PARTS[self.case.pass_] for name, x in owned[kernel].items()}

    def _poison(self) -> None:
        for x in self._owned().values():
            if x is not None:
                x.fill_(float("nan"))

    def _outputs(self) -> dict[str, torch.Tensor]:
        found = {name: x for name, x in self._owned().items() if x is not None}
        found.pop("rows", None)
        partials = found.pop("partials", None)
        if partials is not None and self.case.pass_ == "bwd_dq":
            found["dsinks"] = partials.sum(0)
        return found


TRITON = Triton()
