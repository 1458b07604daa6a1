"""Calls of the Hopper forward as plain data, so that another process can make them: shapes, values, and what is judged.

A case names everything that a call depends on. :func:`problems` makes it and says what is wrong with the result, by the
rule of flash_sink_attn.testing; :func:`build` compiles its kernel alone; :func:`draw` makes one at random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from flash_sink_attn.config import HopperFwdConfig
from flash_sink_attn.reference import attention_reference, eager_attention
from flash_sink_attn.testing import LSE_ROUNDING, AttentionInputs, check, make_inputs, relative_error, unit_roundoff
from flash_sink_attn.validity import limits_of, reject_reason

SINKS = ("normal", "none", "absent", "high", "low", "half")
VALUES = ("normal", "rising", "falling", "waves")
LAYOUTS = ("contiguous", "packed", "heads_first")
PEAK = 200.0  # of the scores that are not normal


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        config: fields of HopperFwdConfig.
        seqlens, seqlens_k: of a packed batch; then batch, seqlen_q and seqlen_k are not looked at.
        sinks: one of SINKS: standard normal, None, all minus infinity, 30 above or below the usual logits, normal in
            the half dtype.
        values: one of VALUES: all standard normal, or scores that go from -PEAK to PEAK along the keys, back, or up and
            down, so that the running maximum has to follow.
        layout: one of LAYOUTS: how q, k and v lie in memory; packed: sliced from one projection.
        poison: also with NaN and infinities in one sequence, or member of the batch, which may not reach the others.
        section_heads: of a section, in place of what sections.key_heads says, None = as it is.
    """

    head_dim: int
    config: dict[str, Any]
    head_dim_v: int = 0
    dtype: str = "bfloat16"
    heads_kv: int = 1
    group: int = 1
    window: int | None = None
    batch: int = 1
    seqlen_q: int = 0
    seqlen_k: int = 0
    seqlens: tuple[int, ...] = ()
    seqlens_k: tuple[int, ...] = ()
    sinks: str = "normal"
    values: str = "normal"
    layout: str = "contiguous"
    poison: bool = False
    section_heads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seqlens", "seqlens_k"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, of in (("head_dim_v", "head_dim"), ("seqlen_k", "seqlen_q"), ("seqlens_k", "seqlens")):
            object.__setattr__(self, name, getattr(self, name) or getattr(self, of))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def rejected(self) -> str | None:
        """Why the validity rule refuses it."""
        return reject_reason(HopperFwdConfig(**self.config), "hopper_fwd", head_dim=self.head_dim,
                             head_dim_v=self.head_dim_v, group=self.group, limits=limits_of(90))

    def inputs(self, device: str) -> AttentionInputs:
        x = make_inputs(batch=self.batch, seqlen_q=self.seqlen_q, seqlen_k=self.seqlen_k,
                        heads_q=self.group * self.heads_kv, heads_kv=self.heads_kv, head_dim=self.head_dim,
                        head_dim_v=self.head_dim_v, dtype=self.torch_dtype, device=device, seed=self.seed,
                        seqlens=self.seqlens or None, seqlens_k=self.seqlens_k or None, sinks=self.sinks != "none")
        if x.sinks is not None:
            if self.sinks == "absent":
                x.sinks.fill_(-math.inf)
            elif self.sinks in ("high", "low"):
                x.sinks.add_(30.0 if self.sinks == "high" else -30.0)
        sinks = x.sinks.to(self.torch_dtype) if x.sinks is not None and self.sinks == "half" else x.sinks
        q, k, v = x.q, x.k, x.v
        if self.values != "normal":
            q, k = _ramp(q, k, self.values)
        q, k, v = _laid_out(q, k, v, self.layout)
        return dataclasses.replace(x, q=q, k=k, v=v, sinks=sinks)


def _ramp(q: torch.Tensor, k: torch.Tensor, values: str) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k whose scores, with the usual scale, follow the keys' places."""
    head_dim = q.shape[-1]
    place = torch.linspace(-1, 1, k.shape[-3], device=k.device)
    along = {"rising": place, "falling": -place, "waves": torch.sin(19 * place)}[values]
    size = math.sqrt(PEAK * math.sqrt(head_dim))
    direction = torch.ones(head_dim, device=k.device) / math.sqrt(head_dim)
    ramp = along[:, None, None] * (size * direction)
    return (q / 4 + (size * direction).to(q.dtype)), (k / 4 + ramp.to(k.dtype))


def _laid_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> tuple[torch.Tensor, ...]:
    if layout == "heads_first":
        return tuple(t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in (q, k, v))
    if layout == "packed" and q.shape[:-2] == k.shape[:-2]:
        joined = torch.cat([t.flatten(-2) for t in (q, k, v)], dim=-1)
        parts = joined.split([t.shape[-2] * t.shape[-1] for t in (q, k, v)], dim=-1)
        return tuple(part.unflatten(-1, t.shape[-2:]) for part, t in zip(parts, (q, k, v), strict=True))
    return q, k, v


CAUSAL_64 = (64, 64, HopperFwdConfig(192, 128, 3, PROGRAMS_PER_SM=1))
CAUSAL_128 = (128, 128, HopperFwdConfig(128, 128, 2, PROGRAMS_PER_SM=1))
WINDOW_64 = (64, 64, HopperFwdConfig(64, 64, 3, Q_STAGES=2, HEADS=4, PROGRAMS_PER_SM=3, maxnreg=80))
WINDOW_128 = (128, 128, HopperFwdConfig(128, 64, 5, Q_STAGES=2, HEADS=4, SHARE_Q=True, PROGRAMS_PER_SM=1))
MIMO = (192, 128, HopperFwdConfig(64, 64, 2, SHARE_Q=True, PROGRAMS_PER_SM=2))
WIDE = (256, 256, HopperFwdConfig(128, 64, 2, SHARE_Q=True))
ODD = (96, 96, HopperFwdConfig(128, 64, 2, PROGRAMS_PER_SM=1))
# (head dim of q and k, of v, configuration), and a window where it is made for one
FAMILIES: dict[str, tuple[tuple[int, int, HopperFwdConfig], int | None]] = {
    "64": (CAUSAL_64, None),
    "64-four-warpgroups": ((64, 64, HopperFwdConfig(256, 64, 4, PROGRAMS_PER_SM=1)), None),
    "64-four-two-tiles": ((64, 64, HopperFwdConfig(256, 64, 4, Q_STAGES=2, PROGRAMS_PER_SM=1)), 1024),
    "64-three-two-tiles": ((64, 64, HopperFwdConfig(192, 64, 6, Q_STAGES=2, PROGRAMS_PER_SM=1)), 512),
    "64-one-warpgroup": ((64, 64, HopperFwdConfig(64, 128, 2)), None),
    "64-one-loop": ((64, 64, HopperFwdConfig(128, 64, 2, SPLIT_LOOPS=False)), 100),
    "64-window": (WINDOW_64, 128),
    "64-packed": ((64, 64, HopperFwdConfig(64, 64, 3, Q_STAGES=2, HEADS=2, PACK_HEADS=4, maxnreg=80)), 128),
    "64-packed-pairs": ((64, 64, HopperFwdConfig(64, 64, 5, HEADS=1, PACK_HEADS=2, PROGRAMS_PER_SM=2)), 200),
    "64-window-two-heads": ((64, 64, HopperFwdConfig(64, 64, 3, HEADS=2)), 128),
    "64-window-tokens": ((64, 64, HopperFwdConfig(64, 64, 2, PROGRAMS_PER_SM=3, maxnreg=80)), 128),
    "64-alone": ((64, 64, HopperFwdConfig(64, 64, PROGRAMS_PER_SM=4, maxnreg=128, LOADER=False)), 128),
    "64-narrow": ((64, 64, HopperFwdConfig(64, 32, 5, Q_STAGES=2, HEADS=3)), 37),
    "96": (ODD, None),
    "128": (CAUSAL_128, None),
    "128-one-loop": ((128, 128, HopperFwdConfig(128, 128, 2, Q_STAGES=2, PROGRAMS_PER_SM=1, SPLIT_LOOPS=False)), None),
    "128-two-tiles": ((128, 128, HopperFwdConfig(128, 128, 2, Q_STAGES=2, PROGRAMS_PER_SM=1)), None),
    "128-three-warpgroups": ((128, 128, HopperFwdConfig(192, 64, 4, SHARE_Q=True, PROGRAMS_PER_SM=1)), None),
    "128-three-two-tiles": ((128, 128, HopperFwdConfig(192, 64, 3, Q_STAGES=2, SHARE_Q=True, PROGRAMS_PER_SM=1)), 512),
    "128-window": (WINDOW_128, 256),
    "128-window-tokens": ((128, 128, HopperFwdConfig(64, 64, 2, Q_STAGES=2, SHARE_Q=True, PROGRAMS_PER_SM=2)), 256),
    "128-alone": ((128, 128, HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3, LOADER=False)), 256),
    "192": (MIMO, 128),
    "192-three-warpgroups": ((192, 128, HopperFwdConfig(192, 64, 3, SHARE_Q=True, PROGRAMS_PER_SM=1)), None),
    "192-heads": ((192, 128, HopperFwdConfig(128, 64, 3, HEADS=4, SHARE_Q=True, PROGRAMS_PER_SM=1)), 128),
    "256": (WIDE, None),
}


def case(family: tuple[int, int, HopperFwdConfig], **more: Any) -> Case:
    head_dim, head_dim_v, config = family
    return Case(head_dim, config.to_dict(), head_dim_v, **({"batch": 2, "group": 8, "heads_kv": 2} | more))


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Whatever torch allocates without filling it is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def _sections_of(heads: int | None) -> Iterator[None]:
    """Sections of the grid that hold so many key heads; calls already recorded had others."""
    from flash_sink_attn import calls
    from flash_sink_attn.hopper import sections

    if heads is None:
        yield
        return
    before = sections.key_heads
    sections.key_heads = lambda *shape: min(heads, shape[0])  # type: ignore[assignment]
    calls._calls.clear()
    try:
        yield
    finally:
        sections.key_heads = before
        calls._calls.clear()


def call(case: Case, x: AttentionInputs) -> dict[str, torch.Tensor]:
    """o and lse by the public function, in memory that was full of NaN."""
    from flash_sink_attn import flash_sink_attn_func, flash_sink_attn_varlen_func

    how: dict[str, Any] = {"return_lse": True, "impl": "hopper", "config": {"hopper_fwd": case.config}}
    with torch.no_grad(), _poisoned_memory(), _sections_of(case.section_heads):
        if x.cu_seqlens_q is None:
            o, lse = flash_sink_attn_func(x.q, x.k, x.v, x.sinks, case.window, **how)
        else:
            own_k = x.cu_seqlens_k if case.seqlens_k != case.seqlens else None
            o, lse = flash_sink_attn_varlen_func(x.q, x.k, x.v, x.sinks, x.cu_seqlens_q, case.window,
                                                 cu_seqlens_k=own_k, **how)
    return {"o": o, "lse": lse}


def problems(case: Case, device: str = "cuda") -> list[str]:
    """What is wrong with the call's results: they break the error rule, change from call to call, or leak."""
    if reason := case.rejected():
        return [f"not a valid case: {reason}"]
    x = case.inputs(device)
    found = call(case, x)
    again = call(case, x)
    wrong = [f"{name}: not the same bits twice" for name in found if not _same(found[name], again[name])]
    sinks = None if x.sinks is None else x.sinks.float()
    given: dict[str, Any] = {"window": case.window, "cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k}
    truth = dict(zip(("o", "lse"), attention_reference(x.q, x.k, x.v, sinks, **given), strict=True))
    eager = dict(zip(("o", "lse"), eager_attention(x.q, x.k, x.v, sinks, return_lse=True, **given), strict=True))
    wrong += [outcome.message for outcome in check(found, truth, eager, case.torch_dtype).values() if not outcome.ok]
    if case.values != "normal":
        wrong += _beyond_large_scores(case, found, truth)
    if case.poison:
        wrong += _leaks(case, x, found)
    return wrong


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _beyond_large_scores(case: Case, found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> list[str]:
    """Eager's half-precision scores are so wrong at this size that they would excuse nearly everything: here float32
    scores are asked for, so lse to a rounding of the largest score and o to what P's and o's own roundings make."""
    wrong = []
    finite = truth["lse"].isfinite()
    distance = (found["lse"].double() - truth["lse"].double())[finite].abs().max() if bool(finite.any()) else 0.0
    if not float(distance) <= 2 * LSE_ROUNDING * 1.25 * PEAK:
        wrong.append(f"lse: {float(distance):.3g} away from the truth, the scores being at most {PEAK}")
    error = relative_error(found["o"], truth["o"])
    # where all scores lie far below the sink, all of o is less than the dtype's smallest number, and 0 is right
    vanishes = float(truth["o"].abs().max()) < torch.finfo(case.torch_dtype).tiny if truth["o"].numel() else True
    if case.sinks != "high" and not vanishes and not error <= 4 * unit_roundoff(case.torch_dtype):
        wrong.append(f"o: error {error:.3g} where float32 scores leave four roundings")
    return wrong


def _leaks(case: Case, x: AttentionInputs, clean: dict[str, torch.Tensor]) -> list[str]:
    """Results of the others when one sequence is full of NaN and infinities: the same bits."""
    parts = {name: getattr(x, name).clone() for name in ("q", "k", "v")}
    if x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        victim = max(range(len(case.seqlens)), key=lambda i: (
            case.seqlens_k[i] > 0, 0 < i < len(case.seqlens) - 1, case.seqlens_k[i]))
        at_q, at_k = (slice(int(cu[victim]), int(cu[victim + 1])) for cu in (x.cu_seqlens_q, x.cu_seqlens_k))
    else:
        victim = min(1, case.batch - 1)
        at_q = at_k = slice(victim, victim + 1)
    for name, tensor in parts.items():
        part = tensor[at_q if name == "q" else at_k]
        part.fill_(math.nan)
        part[..., ::2] = math.inf
        part[..., 1::4] = -math.inf
    # clones are dense: the strides of the layout come with _laid_out
    q, k, v = _laid_out(parts["q"], parts["k"], parts["v"], case.layout)
    dirty = call(case, dataclasses.replace(x, q=q, k=k, v=v))
    keep = torch.ones(x.q.shape[0], dtype=torch.bool, device=x.q.device)
    keep[at_q] = False
    lse_dim = 0 if x.cu_seqlens_q is None else 1
    pairs = {"o": (clean["o"][keep], dirty["o"][keep]),
             "lse": tuple(t[name].movedim(lse_dim, 0)[keep] for t, name in ((clean, "lse"), (dirty, "lse")))}
    return [f"{name}: NaN or infinity of one sequence reached another" for name, (a, b) in pairs.items()
            if not _same(a, b)]


def kernel_name(kernel: Any, runtime: Sequence[Any], constants: Mapping[str, Any], how: Mapping[str, Any]) -> str:
    """Names what a launch compiles: equal for launches that share a kernel, and its function's name comes first."""
    kinds = [(x.base.dtype, x.block_shape) if hasattr(x, "block_shape") else getattr(x, "dtype", type(x))
             for x in runtime]
    options = {name: x for name, x in how.items() if name != "check"}  # that is asked of what was compiled
    return f"{kernel.__name__} {kinds} {dict(constants)} {options}"


@contextlib.contextmanager
def launching(launch: Callable[..., Any] | None) -> Iterator[None]:
    """What the Hopper passes launch goes to ``launch`` instead, whose arguments are those of launcher.launch."""
    from flash_sink_attn.hopper import launch_backward, launch_forward

    modules: tuple[Any, Any] = (launch_forward, launch_backward)
    before = [module.launch for module in modules]
    if launch is not None:
        launch_forward.launch = launch_backward.launch = launch
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.launch = own


def kernels_of(case: Case, build: Callable[..., Any] | None = None) -> tuple[str, ...]:
    """Names the kernels that the call will use, one for each launch."""
    found: list[str] = []

    def note(kernel: Any, programs: int, device: Any, runtime: list[Any], constants: dict[str, Any],
             **how: Any) -> None:
        found.append(kernel_name(kernel, runtime, constants, how))

    (build or globals()["build"])(case, note)
    return tuple(found)


def build(case: Case, launch: Callable[..., Any] | None = None) -> Any:
    """Compile the kernel that the call will use, without a GPU; as flash_sink_attn.compile_only does. With ``launch``
    hand that the launch instead."""
    from flash_sink_attn.hopper.launch_forward import forward
    from flash_sink_attn.layout import Sequences

    x = dataclasses.replace(case, values="normal").inputs("meta")
    q, k, v, sinks = x.q, x.k, x.v, x.sinks
    o = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="meta")
    if x.cu_seqlens_q is None:
        lse_shape: tuple[int, ...] = (q.shape[0], q.shape[2], q.shape[1])
        sequences = Sequences(q.shape[0], q.shape[1], k.shape[1])
    else:
        lse_shape = (q.shape[1], q.shape[0])
        own_k = x.cu_seqlens_k if case.seqlens_k != case.seqlens else None
        sequences = Sequences(len(case.seqlens), q.shape[0], k.shape[0], x.cu_seqlens_q, own_k)
    window = None if case.window is not None and case.window >= (k.shape[0] if case.seqlens else k.shape[1]) else (
        case.window)
    with launching(launch):
        return forward(q, k, v, sinks, o, torch.empty(lse_shape, device="meta"), sequences=sequences, window=window,
                       scale=q.shape[-1] ** -0.5, config=HopperFwdConfig(**case.config))


DIMS = ((64, 64), (64, 64), (64, 64), (128, 128), (128, 128), (96, 96), (192, 128), (256, 256))


def _draw_config(r: random.Random, head_dim: int, head_dim_v: int, group: int) -> HopperFwdConfig:
    packed = head_dim == 64 and r.random() < 0.5  # at random it would hardly ever fit the rest
    while True:
        pack = r.choice((2, 4))
        config = HopperFwdConfig(
            64, 64, r.choice((2, 3, 4, 5)), r.choice((1, 2)), r.choice((1, 2)), pack,
            PROGRAMS_PER_SM=r.choice((0, 1, 3)), maxnreg=r.choice((None, 80))
        ) if packed and group % pack == 0 else HopperFwdConfig(
            BLOCK_M=r.choice((64, 64, 128, 128, 192, 256)), BLOCK_N=r.choice((32, 64, 64, 128)),
            num_stages=r.choice((1, 2, 2, 3, 4, 5)), Q_STAGES=r.choice((1, 1, 2, 3)),
            HEADS=r.choice((0, 0, 1, 2, 3, 4)), SPLIT_LOOPS=r.random() < 0.85, SHARE_Q=r.random() < 0.4,
            PROGRAMS_PER_SM=r.choice((0, 0, 1, 2, 3)), maxnreg=r.choice((None, None, None, 80, 104)))
        if reject_reason(config, "hopper_fwd", head_dim=head_dim, head_dim_v=head_dim_v, group=group,
                         limits=limits_of(90)) is None:
            return config


def _draw_alone(r: random.Random) -> HopperFwdConfig:
    return HopperFwdConfig(64, 64, SPLIT_LOOPS=r.random() < 0.75, PROGRAMS_PER_SM=r.choice((0, 1, 3)),
                           LOADER=False)


MOST_SCORES = 4_000_000  # of a drawn call: what is compared with it takes the GPU a tenth of a second at most
KINDS = 29
_ALONE = range(25, 29)  # kinds without a loader, of head dims 64 and 128


def scores(case: Case) -> int:
    """Query heads x queries x keys, all sequences together: what it costs to compute the truth."""
    lengths = [(case.seqlen_q, case.seqlen_k)] * case.batch if not case.seqlens else zip(
        case.seqlens, case.seqlens_k, strict=True)
    return case.group * case.heads_kv * sum(n * m for n, m in lengths)


def draw(seed: int, kinds: int = KINDS) -> Case:
    """The case of a seed. There are ``kinds`` kinds of them, which take turns: what decides which kernel is compiled
    belongs to the kind, all else to the seed."""
    return next(case for longest in (700, 350, 150, 60, 20) if scores(
        case := _draw(seed, seed % kinds, longest)) <= MOST_SCORES)


def _draw(seed: int, kind: int, longest: int) -> Case:
    own = random.Random(f"case {seed}")
    r = random.Random(f"kind {kind}")
    head_dim, head_dim_v = DIMS[kind % len(DIMS)]
    group = r.choice((1, 2, 4, 5, 7, 8, 8))
    varlen, own_keys = r.random() < 0.35, r.random() < 0.3
    config = _draw_alone(r) if kind in _ALONE else _draw_config(r, head_dim, head_dim_v, group)
    # one side of everything that the window decides: whether its edge and the diagonal can meet in a block, and whether
    # all that 64 tokens see fits the ring
    windows = r.choice((None, (1, config.BLOCK_N + 61), (config.BLOCK_N + 62, 2000)))
    ring = config.num_stages * config.BLOCK_N - 63
    if windows is not None and config.HEADS > 1 and ring > windows[0]:
        windows = (windows[0], min(windows[1], ring)) if r.random() < 0.7 else (max(windows[0], ring + 1), windows[1])
    if windows is not None and windows[0] > windows[1]:
        windows = None
    if config.PACK_HEADS:
        windows = (1, 64 * (config.num_stages - 1))
    sinks = r.choice(("normal", "normal", "none", "half"))
    if sinks == "normal":
        sinks = own.choice(("normal", "normal", "absent", "high", "low"))

    def length() -> int:
        return own.choice((1, 2, 63, 64, 65, own.randint(3, 200), own.randint(longest // 8, longest),
                           own.randint(longest // 8, longest)))

    shape: dict[str, Any] = {}
    if varlen:
        count = own.choice((1, 2, 3, 4, 8))
        shape["seqlens"] = [own.choice((0, length(), length())) for _ in range(count)]
        shape["seqlens"][own.randrange(count)] = length()
        if own_keys:
            shape["seqlens_k"] = [own.choice((0, n, n + own.randint(1, 100), length())) for n in shape["seqlens"]]
            shape["seqlens_k"][own.randrange(count)] = length()
            if shape["seqlens_k"] == shape["seqlens"]:
                shape["seqlens_k"][0] += 1
        keys = sum(shape.get("seqlens_k", shape["seqlens"]))
    else:
        n = length()
        shape = {"batch": own.choice((1, 1, 2, 3, 6)), "seqlen_q": n,
                 "seqlen_k": own.choice((n, n, n + own.randint(1, longest), max(1, n // 3)))}
        keys = shape["seqlen_k"]
    window = None
    if windows is not None:
        low, high = windows
        window = own.choice((low, own.randint(low, min(high, low + 150)), own.randint(low, high)))
        if window >= keys:  # it would be none, another kernel
            if keys <= low:
                short = {"seqlens": [low + 1 + own.randint(0, 99)]} if varlen else {
                    "batch": 2, "seqlen_q": own.randint(1, low + 100), "seqlen_k": low + 1 + own.randint(0, 99)}
                if varlen and own_keys:
                    short["seqlens_k"] = [n + 1 for n in short["seqlens"]]
                shape, window = short, low
            else:
                window = own.randint(low, min(high, keys - 1))
    heads_kv = own.choice((1, 1, 2, 3) if group < 5 else (1, 1, 2))
    return Case(head_dim, config.to_dict(), head_dim_v, r.choice(("bfloat16", "float16")), heads_kv, group, window,
                sinks=sinks, values=own.choice(("normal",) * 5 + VALUES[1:]),
                layout=own.choice(("contiguous", "contiguous", *LAYOUTS[1:])), poison=own.random() < 0.3,
                section_heads=own.choice((None, None, None, 1, 2)), seed=seed, **shape)
