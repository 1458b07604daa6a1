"""Our two families of kernels as implementations: their passes, tunables and calls."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flash_sink_attn.config import (
    CONFIG_CLASS,
    HOPPER_SLIDE_WINDOW,
    AnyConfig,
    AttnConfig,
    HopperBwdConfig,
    HopperBwdForm,
    HopperFwdConfig,
    Impl,
    Kernel,
    TileConfig,
    reproducible,
)
from flash_sink_attn.validity import HOPPER_BWD_HEAD_DIMS, HOPPER_HEAD_DIMS, limits_of, reject_reason
from sweeps.cases import Case
from sweeps.implementation import Inputs, Prepared
from sweeps.placements import empty_beside

if TYPE_CHECKING:
    import torch

    from flash_sink_attn.tuned_table import ShapeKey

# The kernels each pass launches, in order.
LAUNCHES: dict[Impl, dict[str, tuple[Kernel, ...]]] = {
    "triton": {"fwd": ("fwd",), "bwd_dq": ("bwd_dq",), "bwd_dkdv": ("bwd_dkdv",), "bwd": ("bwd_dq", "bwd_dkdv"),
               "fwd_bwd": ("fwd", "bwd_dq", "bwd_dkdv")},
    "hopper": {"fwd": ("hopper_fwd",), "bwd": ("hopper_bwd",), "fwd_bwd": ("hopper_fwd", "hopper_bwd")},
}


class MiscompiledError(RuntimeError):
    """A kernel that was built and would compute wrong values; it must not be timed, and not be run."""


def _beside_code(config: AnyConfig) -> str:
    """What of a configuration is not in the machine code that is hashed, the main kernel's.

    How many programs share the tiles, and the tile of the kernel that recomputes dq.
    """
    if isinstance(config, HopperFwdConfig):
        return f".{config.PROGRAMS_PER_SM}"
    if isinstance(config, HopperBwdConfig) and config.FORM == HopperBwdForm.RECOMPUTE:
        return f".{config.BLOCK_M}"
    return ""


def tiles_of(case: Case, config: Mapping[str, Any], impl: Impl = "triton") -> AttnConfig:
    """A trial's config as an AttnConfig: flat for a pass of one kernel, else by kernel name; {} = heuristic."""
    kernels = LAUNCHES[impl][case.pass_]
    if not config:
        return AttnConfig()
    return AttnConfig.from_dict({kernels[0]: config} if len(kernels) == 1 else config)


def kernel_of(impl: str, pass_: str) -> Kernel | None:
    """The kernel that a pass of one of ours is, None for a pass of several and for a peer."""
    kernels = LAUNCHES.get(impl, {}).get(pass_, ())  # type: ignore[call-overload]
    return kernels[0] if len(kernels) == 1 else None


def num_warps(impl: str, pass_: str, config: Mapping[str, Any]) -> int | None:
    """Warps of a program with this configuration: the Hopper kernels' follow from their tiles."""
    kernel = kernel_of(impl, pass_)
    if "num_warps" in config or kernel is None or not {"BLOCK_M", "BLOCK_N"} <= set(config):
        return config.get("num_warps")
    return CONFIG_CLASS[kernel].from_dict(config).num_warps


class Ours:
    """What both families have in common. Configurations are the fields of the kernel's class; {} is the heuristic."""

    name: Impl
    is_flash = False
    # Passes that are composed of others, which are tuned first: what of whose configuration goes under which name.
    wholes: Mapping[str, Mapping[str, Kernel]]

    def unavailable(self) -> str | None:
        raise NotImplementedError

    def unsupported(self, case: Case) -> str | None:
        raise NotImplementedError

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """The package's version; the kernels' source hash is part of the environment."""
        import flash_sink_attn

        return {"flash_sink_attn": flash_sink_attn.__version__}

    def kernel_of(self, pass_: str) -> Kernel | None:
        """The kernel that a pass is, None for one of several."""
        return kernel_of(self.name, pass_)

    def default_config(self, case: Case, arch: int) -> dict[str, Any]:
        """What the dispatcher's heuristic would use, in the form of a trial's config."""
        tiles: dict[str, dict[str, Any]] = {
            kernel: tile.to_dict() for kernel, tile in self.tiles(case, {}, arch).items()}
        return tiles if len(tiles) > 1 else next(iter(tiles.values()))

    def rejected(self, case: Case, config: Mapping[str, Any], arch: int) -> str | None:
        """The launcher's own validity rule."""
        try:
            tiles = tiles_of(case, config, self.name)
        except ValueError as error:
            return str(error)
        kernels = LAUNCHES[self.name][case.pass_]
        for kernel in kernels:
            tile = getattr(tiles, kernel)
            reason = tile and reject_reason(tile, kernel, head_dim=case.head_dim, head_dim_v=case.head_dim_v,
                                            group=case.heads_q // case.heads_kv, limits=limits_of(arch))
            if reason:
                return f"{kernel}: {reason}" if len(kernels) > 1 else reason
        return None

    def compile(self, case: Case, config: Mapping[str, Any], arch: int) -> dict[str, Any]:
        """Build the pass's kernels; figures are the largest of them, except counts of instructions, their sum.

        Raises:
            MiscompiledError: the machine code of one of them overwrites an operand that it still needs.
        """
        import torch

        from flash_sink_attn.compile_only import compile_kernel

        varlen = bool(case.varlen)
        tiles = self.tiles(case, config, arch)
        built = [compile_kernel(
            kernel, tile, dtype=getattr(torch, case.dtype), batch=case.batch,
            seqlen_q=sum(case.seqlens) if varlen else case.seqlen_q,
            seqlen_k=sum(case.seqlens) if varlen else case.seqlen_k, heads_q=case.heads_q, heads_kv=case.heads_kv,
            head_dim=case.head_dim, head_dim_v=case.head_dim_v, window=case.window, varlen=varlen, sinks=case.sinks,
            arch=arch) for kernel, tile in tiles.items()]
        if fault := next((b.fault for b in built if b.fault), None):
            raise MiscompiledError(f"the compiler made wrong machine code: {fault}")
        return {**{name: max(getattr(b, name) for b in built) for name in ("registers", "spills", "shared_bytes")},
                **{name: sum(getattr(b, name) for b in built) for name in ("hgmma", "tma", "local", "mufu",
                                                                           "instructions")},
                **({"threads": 32 * next(iter(tiles.values())).num_warps} if len(tiles) == 1 else {}),
                "cache_hit": all(b.cached for b in built),
                "binary": "-".join(b.binary + _beside_code(t) for b, t in zip(built, tiles.values(), strict=True))}

    def tiles(self, case: Case, config: Mapping[str, Any], arch: int) -> dict[Kernel, AnyConfig]:
        """The configuration of every kernel of the pass."""
        from flash_sink_attn.heuristic import heuristic

        chosen, key = tiles_of(case, config, self.name), shape_key(case)
        return {kernel: getattr(chosen, kernel) or heuristic(kernel, key, limits_of(arch))
                for kernel in LAUNCHES[self.name][case.pass_]}

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        """Allocate the outputs and bind the launches; a backward runs the portable forward here, with the heuristic's
        tiles."""
        from flash_sink_attn.dispatch import device_info

        arch = device_info(inputs.q.device).arch
        own = self.tiles(case, config, arch)
        earlier = TRITON.tiles(dataclasses.replace(case, pass_="fwd_bwd"), {}, arch)
        return _Call(case, LAUNCHES[self.name][case.pass_], {**earlier, **own}, inputs).prepared()


class Triton(Ours):
    """``impl`` triton: flash_sink_attn.kernels, which run everywhere."""

    name: Impl = "triton"
    wholes = {"bwd": {"bwd_dq": "bwd_dq", "bwd_dkdv": "bwd_dkdv"},
              "fwd_bwd": {"fwd": "fwd", "bwd_dq": "bwd_dq", "bwd_dkdv": "bwd_dkdv"}}

    def unavailable(self) -> str | None:
        """None also without a GPU, where the kernels run in Triton's interpreter, unless NumPy is too new for it."""
        from flash_sink_attn import _mode

        return _mode.PROBLEM

    def unsupported(self, case: Case) -> str | None:
        """None: every case is within the kernels' range, which is checked when it is described."""
        return None

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        """A grid around what is known to be good, for a sweep that names no tiles."""
        if case.pass_ in self.wholes:
            return []  # composed of its parts' winners
        grids = {"fwd": ((64, 128), (32, 64, 128)), "bwd_dq": ((64, 128), (32, 64, 128)),
                 "bwd_dkdv": ((32, 64), (64, 128))}[case.pass_]
        pack = (False, True) if case.pass_ == "fwd" and case.window and case.heads_q > case.heads_kv else (False,)
        split = (False, True) if case.window else (True,)
        return [TileConfig(m, n, w, s, PACK_GQA=p, SPLIT_LOOPS=x).to_dict()
                for m, n in itertools.product(*grids) for w, s, p, x in itertools.product((4, 8), (2, 3), pack, split)]


class Hopper(Ours):
    """``impl`` hopper: flash_sink_attn.hopper, for Hopper cards."""

    name: Impl = "hopper"
    wholes = {"fwd_bwd": {"fwd": "hopper_fwd", "bwd": "hopper_bwd"}}

    def unavailable(self) -> str | None:
        """Why this machine cannot run them: its device, or its Triton's Gluon."""
        import torch

        from flash_sink_attn import _mode
        from flash_sink_attn.hopper import support

        if _mode.COMPILE_ONLY:
            return support.gluon_problem()
        return support.device_problem(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))

    def unsupported(self, case: Case) -> str | None:
        """Parts of a backward, which is one kernel here, and head dims that nobody wrote it for."""
        if case.pass_ not in LAUNCHES["hopper"]:
            return "the Hopper backward makes all gradients in one: it has no such part"
        dims = HOPPER_HEAD_DIMS if case.pass_ == "fwd" else HOPPER_BWD_HEAD_DIMS
        if (case.head_dim, case.head_dim_v) not in dims:
            return f"the Hopper kernels do not have the head dims {case.head_dim}/{case.head_dim_v}"
        return None

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        """A grid around what is known to be good, for a sweep that names no tiles."""
        if case.pass_ in self.wholes:
            return []  # composed of its parts' winners
        if case.pass_ == "bwd":
            small = case.head_dim <= 64
            if case.head_dim > 128:
                return [HopperBwdConfig(64, n, s, DETERMINISTIC=ordered).to_dict()
                        for n in ((64, 128) if case.head_dim == 192 else (64,))
                        for s, ordered in ((2, False), (3, False), (2, True)) if s == 2 or n == 64]
            tried = [HopperBwdConfig(64, 128, s, FORM=0) for s in ((2, 3, 4) if small else (2, 3))]
            tried += [HopperBwdConfig(64, 128, SPLIT_GROUP=2),
                      *(HopperBwdConfig(64, 128, SPLIT_GROUP=s, DETERMINISTIC=True) for s in (1, 2))]
            if case.window:
                tried += [HopperBwdConfig(m, n, s, FORM=1)
                          for m, n, s in itertools.product((64, 128), (64, 128), (2, 3))]
            if case.window and case.window <= HOPPER_SLIDE_WINDOW and small and case.seqlen_q == case.seqlen_k:
                tried += [HopperBwdConfig(64, 192, s, FORM=2, BUFFERS=b) for s, b in ((2, 3), (3, 2), (3, 3), (4, 2))]
            return [config.to_dict() for config in tried]
        small = case.head_dim <= 64
        found = []
        if case.window:
            programs, registers = (3, 80) if small else (2, None)
            found += [HopperFwdConfig(64, 64, stages, q_stages, heads, SHARE_Q=share,
                                      PROGRAMS_PER_SM=programs, maxnreg=registers)
                     for stages, q_stages in ((2, 1), (3, 2)) for heads in (0, 2, 4)
                     for share in ((False,) if small else (False, True))]
            found += [HopperFwdConfig(128, 64, 5, 2, 4, SHARE_Q=True, PROGRAMS_PER_SM=1)]
        if not case.window or case.window >= 512:
            found += [HopperFwdConfig(m, n, stages, SHARE_Q=share, PROGRAMS_PER_SM=1)
                      for m, n, stages in ((192, 128, 2), (192, 128, 3), (256, 64, 4), (192, 64, 4), (128, 128, 2),
                                           (192, 64, 3), (128, 64, 2))
                      for share in (False, True)]
            found += [HopperFwdConfig(192, 64, 6 if small else 3, 2, SHARE_Q=not small, PROGRAMS_PER_SM=1),
                      *(HopperFwdConfig(m, n, stages, 2, SPLIT_LOOPS=False, SHARE_Q=share, PROGRAMS_PER_SM=1)
                        for m, n, stages, share in ((192, 64, 3, True), (128, 128, 2, False)) if not small)]
        found += [HopperFwdConfig(64, 64, PROGRAMS_PER_SM=4, maxnreg=128, LOADER=False) if small else
                  HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3, LOADER=False)]
        return [config.to_dict() for config in found]


def shape_key(case: Case) -> ShapeKey:
    """The tuned table's key of a case."""
    from flash_sink_attn.tuned_table import ShapeKey

    dims = (case.dtype, case.head_dim, case.head_dim_v, case.heads_q, case.heads_kv, case.window)
    if case.varlen:
        return ShapeKey.packed(*dims, sum(case.seqlens), case.seqlen_q, case.seqlen_k)
    return ShapeKey.fixed(*dims, case.batch, case.seqlen_q, case.seqlen_k)


class _Call:
    """The buffers and launches of one trial.

    Args:
        kernels: what is timed, in order.
        tiles: of those and of what must run before them.
    """

    def __init__(
        self, case: Case, kernels: tuple[Kernel, ...], tiles: Mapping[Kernel, Any], inputs: Inputs
    ) -> None:
        import torch

        from flash_sink_attn.kernels.launch import row_statistics, sink_partials
        from flash_sink_attn.layout import Sequences

        self.case, self.kernels, self.tiles, self.i = case, kernels, tiles, inputs
        q, k, v, cu = inputs.q, inputs.k, inputs.v, inputs.cu_seqlens
        self.sequences = (Sequences(case.batch, q.shape[1], k.shape[1]) if cu is None
                          else Sequences(case.batch, q.shape[0], k.shape[0], cu))
        self.common: dict[str, Any] = {"sequences": self.sequences, "window": inputs.window,
                                       "scale": inputs.softmax_scale}
        lse_shape = (q.shape[1], q.shape[0]) if cu is not None else (q.shape[0], q.shape[2], q.shape[1])
        self.o = empty_beside(inputs.do, (*q.shape[:-1], v.shape[-1]))
        self.lse = empty_beside(q, lse_shape, torch.float32)
        self.dq, self.dk, self.dv = (empty_beside(x, x.shape) for x in (q, k, v))
        self.dsinks = None if inputs.sinks is None else torch.empty_like(inputs.sinks)
        self.rows = self.partials = None
        if "bwd_dq" in kernels or "bwd_dkdv" in kernels:
            self.rows = row_statistics(q, self.sequences)
            if inputs.sinks is not None:
                self.partials = sink_partials(q, k, self.sequences, self.tiles["bwd_dq"])
        self.compiled: Any = None

    def fwd(self) -> None:
        from flash_sink_attn.kernels.launch import forward

        i = self.i
        self.compiled = forward(i.q, i.k, i.v, i.sinks, self.o, self.lse, config=self.tiles["fwd"], **self.common)

    def bwd_dq(self) -> None:
        from flash_sink_attn.kernels.launch import backward_dq

        assert self.rows is not None
        i = self.i
        self.compiled = backward_dq(i.q, i.k, i.v, i.sinks, self.o, self.lse, i.do, None, self.dq, self.rows,
                                    self.partials, config=self.tiles["bwd_dq"], **self.common)

    def bwd_dkdv(self) -> None:
        from flash_sink_attn.kernels.launch import backward_dkdv

        assert self.rows is not None
        i = self.i
        self.compiled = backward_dkdv(i.q, i.k, i.v, self.rows, i.do, self.dk, self.dv, self.partials,
                                      self.dsinks, config=self.tiles["bwd_dkdv"], **self.common)

    def hopper_fwd(self) -> None:
        forward = importlib.import_module("flash_sink_attn.hopper.launch_forward").forward
        i = self.i
        self.compiled = forward(i.q, i.k, i.v, i.sinks, self.o, self.lse, config=self.tiles["hopper_fwd"],
                                **self.common)

    def hopper_bwd(self) -> None:
        backward = importlib.import_module("flash_sink_attn.hopper.launch_backward").backward
        i, config = self.i, self.tiles["hopper_bwd"]
        self.compiled = backward(i.q, i.k, i.v, i.sinks, self.o, self.lse, i.do, None, self.dq, self.dk, self.dv,
                                 self.dsinks, config=config, deterministic=reproducible(config), **self.common)

    def prepared(self) -> Prepared:
        from flash_sink_attn.machine_code import shared_bytes

        launches: dict[Kernel, Callable[[], None]] = {
            kernel: getattr(self, kernel) for kernel in (*_BEFORE[self.kernels[0]], *self.kernels)}
        for earlier in _BEFORE[self.kernels[0]]:
            launches[earlier]()

        def run() -> None:
            for kernel in self.kernels:
                launches[kernel]()

        resources: list[dict[str, int]] = []
        for kernel in self.kernels:
            launches[kernel]()
            if self.compiled is not None:
                resources.append({"registers": self.compiled.n_regs, "spills": self.compiled.n_spills,
                                  "shared_bytes": shared_bytes(self.compiled)})
        largest = {name: max(r[name] for r in resources) for name in resources[0]} if resources else {}
        return Prepared(run=run, outputs=self._outputs, poison=self._poison, resources=largest,
                        deterministic=all(reproducible(self.tiles[kernel]) for kernel in self.kernels))

    def _owned(self) -> dict[str, torch.Tensor | None]:
        """The buffers each kernel of the pass writes, which may be poisoned before a run."""
        forward: dict[str, torch.Tensor | None] = {"o": self.o, "lse": self.lse}
        rest: dict[str, torch.Tensor | None] = {"dk": self.dk, "dv": self.dv, "dsinks": self.dsinks}
        owned: dict[Kernel, dict[str, torch.Tensor | None]] = {
            "fwd": forward, "hopper_fwd": forward,
            "bwd_dq": {"dq": self.dq, "rows": self.rows, "partials": self.partials}, "bwd_dkdv": rest,
            "hopper_bwd": {"dq": self.dq, **rest},
        }
        return {name: x for kernel in self.kernels for name, x in owned[kernel].items()}

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


# What must have run before a kernel, in order.
_BEFORE: dict[Kernel, tuple[Kernel, ...]] = {
    "fwd": (), "bwd_dq": ("fwd",), "bwd_dkdv": ("fwd", "bwd_dq"), "hopper_fwd": (), "hopper_bwd": ("fwd",)}

TRITON, HOPPER = Triton(), Hopper()
