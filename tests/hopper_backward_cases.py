"""Calls of the Hopper backward as plain data, so that another process can make them: as tests.hopper_cases.

``python -m tests.hopper_backward_cases`` answers tests.hopper_worker's Worker.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import torch

from flash_sink_attn.config import HOPPER_SLIDE_WINDOW, HopperBwdConfig, HopperFwdConfig
from flash_sink_attn.reference import attention_reference_gradients, eager_gradients
from flash_sink_attn.testing import AttentionInputs, check
from flash_sink_attn.validity import limits_of, reject_reason
from tests import hopper_cases, hopper_worker
from tests.hopper_cases import LAYOUTS, MOST_SCORES, _laid_out, _poisoned_memory, _same, launching, scores
from tests.hopper_cases import Case as ForwardCase

# What every group has; it is not what is tested. Head dim 256 needs more registers for a matrix instruction.
FORWARD, FORWARD_256 = HopperFwdConfig(64, 64), HopperFwdConfig(128, 64, SHARE_Q=True)
ACCUMULATE_64, ACCUMULATE_128 = HopperBwdConfig(64, 128, 3), HopperBwdConfig(64, 128)
ORDERED_64, ORDERED_128 = (dataclasses.replace(c, DETERMINISTIC=True) for c in (ACCUMULATE_64, ACCUMULATE_128))
RECOMPUTE, RECOMPUTE_TWO = HopperBwdConfig(64, 64, FORM=1), HopperBwdConfig(128, 128, FORM=1)
ACCUMULATE_WIDE, ACCUMULATE_WIDE_3 = HopperBwdConfig(64, 64), HopperBwdConfig(64, 64, 3)
PAIR = HopperBwdConfig(64, 128)  # at head dim 192
SLIDE, SLIDE_SHORT = HopperBwdConfig(64, 192, 4, FORM=2), HopperBwdConfig(64, 192, 2, FORM=2, BUFFERS=3)
# (head dim, configuration), and a window where it is made for one
FAMILIES: dict[str, tuple[int, HopperBwdConfig, int | None]] = {
    "64": (64, ACCUMULATE_64, None),
    "96": (96, ACCUMULATE_128, None),
    "128": (128, ACCUMULATE_128, None),
    "64-window": (64, ACCUMULATE_64, 256),
    "64-ordered": (64, ORDERED_64, None),
    "64-ordered-window": (64, ORDERED_64, 256),
    "96-ordered": (96, ORDERED_128, None),
    "96-window": (96, dataclasses.replace(ACCUMULATE_128, num_stages=3), 300),
    "96-ordered-window": (96, ORDERED_128, 300),
    "96-split": (96, dataclasses.replace(ACCUMULATE_128, SPLIT_GROUP=2), None),
    "128-window": (128, ACCUMULATE_128, 1500),
    "128-ordered": (128, ORDERED_128, None),
    "128-ordered-window": (128, ORDERED_128, 300),
    "64-split": (64, dataclasses.replace(ACCUMULATE_64, SPLIT_GROUP=2), None),
    "64-ordered-split": (64, dataclasses.replace(ORDERED_64, SPLIT_GROUP=2), None),
    "128-ordered-split": (128, dataclasses.replace(ORDERED_128, SPLIT_GROUP=2), None),
    "64-split-four-window": (64, dataclasses.replace(ACCUMULATE_64, SPLIT_GROUP=4), 300),
    "128-split-four": (128, dataclasses.replace(ACCUMULATE_128, SPLIT_GROUP=4), None),
    "64-recompute": (64, RECOMPUTE, 200),
    "128-recompute-split": (128, dataclasses.replace(RECOMPUTE, SPLIT_GROUP=2), 200),
    "64-ordered-split-four": (64, dataclasses.replace(ORDERED_64, SPLIT_GROUP=4), None),
    "128-recompute-split-four": (128, dataclasses.replace(RECOMPUTE, SPLIT_GROUP=4), None),
    "64-recompute-two": (64, RECOMPUTE_TWO, 128),
    "96-recompute": (96, RECOMPUTE, 100),
    "128-recompute": (128, RECOMPUTE, 256),
    "128-recompute-two": (128, RECOMPUTE_TWO, None),
    "64-slide": (64, SLIDE, 128),
    "64-slide-short": (64, SLIDE_SHORT, 37),
    "192": (192, ACCUMULATE_WIDE, None),
    "256": (256, ACCUMULATE_WIDE, None),
    "192-window": (192, ACCUMULATE_WIDE_3, 128),
    "192-window-two": (192, ACCUMULATE_WIDE, 300),
    "192-pair": (192, PAIR, None),
    "192-pair-window": (192, PAIR, 300),
    "192-pair-ordered": (192, dataclasses.replace(PAIR, DETERMINISTIC=True), None),
    "192-pair-ordered-window": (192, dataclasses.replace(PAIR, DETERMINISTIC=True), 300),
    "256-window": (256, ACCUMULATE_WIDE, 200),
    "192-ordered": (192, dataclasses.replace(ACCUMULATE_WIDE, DETERMINISTIC=True), None),
    "256-ordered": (256, dataclasses.replace(ACCUMULATE_WIDE, DETERMINISTIC=True), None),
    "192-ordered-window": (192, dataclasses.replace(ACCUMULATE_WIDE_3, DETERMINISTIC=True), 128),
    "256-ordered-window": (256, dataclasses.replace(ACCUMULATE_WIDE, DETERMINISTIC=True), 200),
}
HEAD_DIM_V = {192: 128}  # where it is another
SINKS = ("normal", "none", "absent", "high", "low", "half")


@dataclasses.dataclass(frozen=True)
class Case(ForwardCase):
    """One call and its backward.

    Attributes:
        config: fields of HopperBwdConfig.
        wanted: of which of q, k, v and s(inks) a gradient is.
        dlse: whether lse has a gradient, too.
        deterministic: whether the caller asks for the same bits each time.
    """

    wanted: str = "qkvs"
    dlse: bool = False
    deterministic: bool = False

    def rejected(self) -> str | None:
        return reject_reason(HopperBwdConfig(**self.config), "hopper_bwd", head_dim=self.head_dim,
                             head_dim_v=self.head_dim_v, group=self.group, limits=limits_of(90))

    @property
    def forward(self) -> HopperFwdConfig:
        return FORWARD_256 if self.head_dim == 256 else FORWARD

    def gradient_of_lse(self, x: AttentionInputs) -> torch.Tensor | None:
        if not self.dlse:
            return None
        packed = x.cu_seqlens_q is not None
        shape = (x.q.shape[1], x.q.shape[0]) if packed else (x.q.shape[0], x.q.shape[2], x.q.shape[1])
        generator = torch.Generator(device=x.q.device).manual_seed(self.seed + 1)
        return torch.randn(shape, generator=generator, device=x.q.device)


def case(of: tuple[int, HopperBwdConfig, int | None], **more: Any) -> Case:
    """A call of a family, with a group of two, or of as many as share it, unless something else is said."""
    head_dim, config, window = of
    return Case(head_dim, config.to_dict(), HEAD_DIM_V.get(head_dim, 0),
                **{"heads_kv": 2, "group": max(2, config.SPLIT_GROUP), "window": window} | more)


def call(case: Case, x: AttentionInputs) -> dict[str, torch.Tensor]:
    """The wanted gradients by the public function, in memory that was full of NaN."""
    from flash_sink_attn import flash_sink_attn_func, flash_sink_attn_varlen_func

    how: dict[str, Any] = {"return_lse": True, "impl": "hopper", "deterministic": case.deterministic or None,
                           "config": {"hopper_fwd": case.forward, "hopper_bwd": case.config}}
    given = {name: None if t is None else t.detach().requires_grad_(name[0] in case.wanted)
             for name, t in (("q", x.q), ("k", x.k), ("v", x.v), ("sinks", x.sinks))}
    with _poisoned_memory():
        if x.cu_seqlens_q is None:
            o, lse = flash_sink_attn_func(*given.values(), case.window, **how)  # type: ignore[arg-type]
        else:
            own_k = x.cu_seqlens_k if case.seqlens_k != case.seqlens else None
            o, lse = flash_sink_attn_varlen_func(*given.values(), x.cu_seqlens_q, case.window,  # type: ignore[arg-type]
                                                 cu_seqlens_k=own_k, **how)
        leaves = {f"d{name}": t for name, t in given.items() if t is not None and t.requires_grad}
        dlse = case.gradient_of_lse(x)
        outputs, gradients = ((o,), (x.do,)) if dlse is None else ((o, lse), (x.do, dlse))
        return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), gradients), strict=True))


def problems(case: Case, device: str = "cuda", call: Callable[..., dict[str, torch.Tensor]] = call) -> list[str]:
    """What is wrong with the gradients: they break the error rule, change from call to call, or leak."""
    if reason := case.rejected():
        return [f"not a valid case: {reason}"]
    x = case.inputs(device)
    found, again = call(case, x), call(case, x)
    reproducible = HopperBwdConfig(**case.config).reproducible
    wrong = [f"{name}: not the same bits twice" for name in found
             if (reproducible or name != "dq") and not _same(found[name], again[name])]
    sinks = None if x.sinks is None else x.sinks.float()
    given: dict[str, Any] = {"window": case.window, "cu_seqlens_q": x.cu_seqlens_q, "cu_seqlens_k": x.cu_seqlens_k,
                             "dlse": case.gradient_of_lse(x)}
    truth = attention_reference_gradients(x.q, x.k, x.v, sinks, x.do, **given)
    eager = eager_gradients(x.q, x.k, x.v, sinks, x.do, **given)
    for results in (found, again):
        judged = {name: t.float() if name == "dsinks" else t for name, t in results.items()}
        wrong += [outcome.message for outcome in check(judged, truth, eager, case.torch_dtype).values()
                  if not outcome.ok]
    if case.poison:
        wrong += _leaks(case, x, found, call)
    return wrong


def _leaks(case: Case, x: AttentionInputs, clean: dict[str, torch.Tensor],
           call: Callable[..., dict[str, torch.Tensor]]) -> list[str]:
    """Gradients of the others when one sequence is full of NaN and infinities: the same bits, or where sums have no
    order nearly the same numbers."""
    parts = {name: getattr(x, name).clone() for name in ("q", "k", "v")}
    if x.cu_seqlens_q is not None and x.cu_seqlens_k is not None:
        victim = max(range(len(case.seqlens)), key=lambda i: (0 < i < len(case.seqlens) - 1, case.seqlens_k[i]))
        at_q, at_k = (slice(int(cu[victim]), int(cu[victim + 1])) for cu in (x.cu_seqlens_q, x.cu_seqlens_k))
    else:
        victim = min(1, case.batch - 1)
        at_q = at_k = slice(victim, victim + 1)
    for name, tensor in parts.items():
        part = tensor[at_q if name == "q" else at_k]
        part.fill_(math.nan)
        part[..., ::2] = math.inf
    q, k, v = _laid_out(parts["q"], parts["k"], parts["v"], case.layout)
    dirty = call(case, dataclasses.replace(x, q=q, k=k, v=v))
    ordered, wrong = HopperBwdConfig(**case.config).reproducible, []
    for name, at in (("dq", at_q), ("dk", at_k), ("dv", at_k)):
        if name in clean:
            keep = torch.ones(clean[name].shape[0], dtype=torch.bool, device=clean[name].device)
            keep[at] = False
            a, b = clean[name][keep].float(), dirty[name][keep].float()
            same = _same(a, b) if ordered or name != "dq" else torch.allclose(a, b, rtol=0.02, atol=0.02)
            wrong += [] if same else [f"{name}: NaN or infinity of one sequence reached another"]
    return wrong


def build(case: Case, launch: Callable[..., Any] | None = None) -> None:
    """Compile the kernels that the call will use, without a GPU; with ``launch`` hand that the launches instead."""
    from flash_sink_attn.hopper import launch_backward, launch_forward
    from flash_sink_attn.layout import Sequences

    x = case.inputs("meta")
    q, k, v, sinks = x.q, x.k, x.v, x.sinks
    o = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device="meta")
    if x.cu_seqlens_q is None:
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), device="meta")
        sequences = Sequences(q.shape[0], q.shape[1], k.shape[1])
    else:
        lse = torch.empty((q.shape[1], q.shape[0]), device="meta")
        own_k = x.cu_seqlens_k if case.seqlens_k != case.seqlens else None
        sequences = Sequences(len(case.seqlens), q.shape[0], k.shape[0], x.cu_seqlens_q, own_k)
    keys = k.shape[0] if case.seqlens else k.shape[1]
    window = None if case.window is not None and case.window >= keys else case.window
    how: dict[str, Any] = {"sequences": sequences, "window": window, "scale": q.shape[-1] ** -0.5}
    want = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") if t is not None and name in case.wanted else None
            for name, t in (("q", q), ("k", k), ("v", v), ("s", sinks))}
    with launching(launch):
        launch_forward.forward(q, k, v, sinks, o, lse, config=case.forward, **how)
        launch_backward.backward(q, k, v, sinks, o, lse, o, lse if case.dlse else None, *want.values(),
                                 config=HopperBwdConfig(**case.config), deterministic=case.deterministic, **how)


def kernels_of(case: Case) -> tuple[str, ...]:
    """Names the kernels that the call will use, one for each launch."""
    return hopper_cases.kernels_of(case, build)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What decides, beside the configuration, which kernels a call uses; configurations share the forward of a setting.

    Attributes:
        packed: "": batches of one length; same: packed batches; own: those with lengths of their own for the keys.
        windows: shortest and longest; within them the forward is the same kernel.
    """

    head_dim: int
    dtype: str
    group: int
    packed: str = ""
    windows: tuple[int, int] | None = None
    sinks: str = "normal"
    dlse: bool = False


SHORT, LONG = (1, 125), (126, 600)
WINDOW_64, PACKED_64 = Setting(64, "bfloat16", 8, "", SHORT), Setting(64, "float16", 5, "same", LONG, "half", True)
OWN_KEYS_64, HEADS_64 = Setting(64, "bfloat16", 2, "own", sinks="none"), Setting(64, "float16", 1)
CAUSAL_128, WINDOW_128 = Setting(128, "bfloat16", 4), Setting(128, "float16", 7, "own", LONG, "normal", True)
CAUSAL_96, WINDOW_96 = Setting(96, "bfloat16", 3, "same", None, "none"), Setting(96, "float16", 2, "", SHORT, "half")
ORDERED_SPLIT_64, ORDERED_SPLIT_128 = (
    dataclasses.replace(c, SPLIT_GROUP=2) for c in (ORDERED_64, ORDERED_128))
RECOMPUTE_SPLIT, RECOMPUTE_TWO_SPLIT = (dataclasses.replace(c, SPLIT_GROUP=2) for c in (RECOMPUTE, RECOMPUTE_TWO))
# Of every seven in a row no two are alike: a few calls already make all forms and head dims.
KINDS: tuple[tuple[Setting, HopperBwdConfig], ...] = (
    (WINDOW_64, SLIDE), (CAUSAL_128, ORDERED_SPLIT_128), (WINDOW_96, RECOMPUTE_SPLIT),
    (Setting(192, "bfloat16", 7), ACCUMULATE_WIDE), (Setting(256, "float16", 2, "", LONG), ACCUMULATE_WIDE),
    (PACKED_64, RECOMPUTE_TWO), (OWN_KEYS_64, ACCUMULATE_64),
    (PACKED_64, SLIDE_SHORT), (WINDOW_128, RECOMPUTE), (CAUSAL_96, ACCUMULATE_128),
    (Setting(192, "float16", 2, "own", SHORT, "normal", True), ACCUMULATE_WIDE_3),
    (Setting(256, "bfloat16", 4, "same", None, "none"), ACCUMULATE_WIDE), (WINDOW_64, ORDERED_SPLIT_64),
    (CAUSAL_128, RECOMPUTE_TWO),
    (WINDOW_64, RECOMPUTE), (CAUSAL_128, ACCUMULATE_128), (WINDOW_96, ORDERED_128), (HEADS_64, ACCUMULATE_64),
    (PACKED_64, dataclasses.replace(ACCUMULATE_64, SPLIT_GROUP=2)), (OWN_KEYS_64, RECOMPUTE_SPLIT),
    (WINDOW_128, RECOMPUTE_TWO_SPLIT),
    (WINDOW_64, RECOMPUTE_TWO), (WINDOW_128, ORDERED_128), (CAUSAL_96, HopperBwdConfig(64, 128, FORM=1)),
    (WINDOW_64, ACCUMULATE_64), (HEADS_64, HopperBwdConfig(64, 64, 3, maxnreg=128, FORM=1)),
    (Setting(192, "bfloat16", 3, "same", None, "half"), PAIR),
    (Setting(192, "float16", 1, "own", LONG, "normal", True), PAIR),
)


def draw(seed: int, kinds: int = len(KINDS)) -> Case:
    """The case of a seed. The first ``kinds`` of KINDS take turns; they decide which kernels are compiled, the seed
    all else."""
    return next(case for longest in (700, 350, 150, 60, 20) if scores(
        case := _draw(seed, *KINDS[seed % kinds], longest)) <= MOST_SCORES)


def _draw(seed: int, setting: Setting, config: HopperBwdConfig, longest: int) -> Case:
    own = random.Random(f"backward case {seed}")
    slides = config.FORM == 2
    # one that cannot slide recomputes, with the kernels of a kind of its own
    other = slides and own.random() < 0.2
    sinks = own.choice(("normal", "normal", "absent", "high", "low")) if setting.sinks == "normal" else setting.sinks

    def length() -> int:
        return own.choice((1, 2, 63, 64, 65, own.randint(3, 200), own.randint(longest // 8, longest),
                           own.randint(longest // 8, longest)))

    low, high = setting.windows or (0, 0)
    if slides and not (other and setting.packed):
        high = min(high, HOPPER_SLIDE_WINDOW)
    shape: dict[str, Any] = {}
    if setting.packed:
        count = own.choice((1, 2, 3, 4, 8))
        lengths = [own.choice((0, length(), length())) for _ in range(count)]
        lengths[own.randrange(count)] = max(length(), low + 1)  # where the window hides nothing it is another kernel
        shape["seqlens"] = lengths
        if setting.packed == "own":
            shape["seqlens_k"] = [own.choice((0, n, n + own.randint(1, 100), length())) for n in lengths]
            shape["seqlens_k"][own.randrange(count)] = max(length(), low + 1)
            if shape["seqlens_k"] == lengths:
                shape["seqlens_k"][0] += 1
        keys = sum(shape.get("seqlens_k", lengths))
    else:
        n = max(length(), low + 1)
        keys = n if slides and not other else max(low + 1, own.choice((n, n, n + own.randint(1, longest), n // 3)))
        shape = {"batch": own.choice((1, 1, 2, 3, 6)), "seqlen_q": n, "seqlen_k": keys}
    window = None
    if setting.windows:
        high = min(high, keys - 1)
        window = own.choice((low, own.randint(low, min(high, low + 64)), own.randint(low, high)))
        if low <= 128 <= high and own.random() < 0.2:
            window = 128
    s = "s" if setting.sinks != "none" else ""
    wanted = own.choice((*("qkv" + s,) * 5, "kv" + s, "q" + s))
    return Case(setting.head_dim, config.to_dict(), HEAD_DIM_V.get(setting.head_dim, 0), setting.dtype,
                own.choice((1, 1, 2, 3) if setting.group < 5 else (1, 1, 2)), setting.group, window, sinks=sinks,
                layout=own.choice(("contiguous", "contiguous", *LAYOUTS[1:])), poison=own.random() < 0.3, seed=seed,
                wanted=wanted, dlse=setting.dlse, deterministic=config.reproducible and own.random() < 0.3, **shape)


if __name__ == "__main__":
    hopper_worker.serve_cases(problems, Case)
