"""The reference against an independent float64 derivation: autograd of a softmax over a concatenated sink column."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch

from flash_sink_attn.reference import (
    attention_reference,
    attention_reference_gradients,
    eager_attention,
    eager_gradients,
)
from flash_sink_attn.testing import AttentionInputs, make_inputs, unit_roundoff

OUTPUTS = ("o", "lse", "dq", "dk", "dv", "dsinks")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Lengths per sequence; ``varlen`` packs them, otherwise all are equal."""

    lengths: tuple[tuple[int, int], ...]
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    window: int | None = None
    varlen: bool = False
    sinks: str = "all"          # all, some (minus infinity on every other head) or none
    softmax_scale: float | None = None

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> AttentionInputs:
        x = make_inputs(
            batch=len(self.lengths), seqlen_q=self.lengths[0][0], seqlen_k=self.lengths[0][1], heads_q=self.heads_q,
            heads_kv=self.heads_kv, head_dim=self.head_dim, head_dim_v=self.head_dim_v, dtype=dtype, seed=seed,
            seqlens=[q for q, _ in self.lengths] if self.varlen else None,
            seqlens_k=[k for _, k in self.lengths] if self.varlen else None, sinks=self.sinks != "none")
        if self.sinks == "some":
            assert x.sinks is not None
            x.sinks[::2] = -math.inf
        return x

    def options(self, x: AttentionInputs) -> dict[str, Any]:
        return {"window": self.window, "softmax_scale": self.softmax_scale, "cu_seqlens_q": x.cu_seqlens_q,
                "cu_seqlens_k": x.cu_seqlens_k}


SHAPES = {
    "causal": Shape(((17, 17),) * 2),
    "one token": Shape(((1, 1),)),
    "mha": Shape(((9, 9),), heads_q=3, heads_kv=3),
    "mqa": Shape(((9, 9),), heads_q=7, heads_kv=1),
    "window": Shape(((23, 23),) * 2, window=5),
    "window 1": Shape(((8, 8),), window=1),
    "window beyond": Shape(((8, 8),), window=100),
    "values wider": Shape(((12, 12),), head_dim=8, head_dim_v=24),
    "scale": Shape(((12, 12),), softmax_scale=0.5),
    "fewer queries": Shape(((5, 19),) * 2),
    "fewer queries, window": Shape(((5, 19),), window=4),
    "more queries": Shape(((19, 5),) * 2),
    "more queries, window": Shape(((19, 5),), window=3),
    "no keys": Shape(((4, 0),)),
    "no sinks": Shape(((11, 11),), sinks="none"),
    "no sinks, more queries": Shape(((11, 6),), sinks="none", window=2),
    "some sinks": Shape(((11, 11),), sinks="some"),
    "some sinks, more queries": Shape(((11, 6),), sinks="some"),
    "varlen": Shape(((7, 7), (0, 0), (1, 1), (13, 13)), varlen=True, window=4),
    "varlen, other keys": Shape(((7, 3), (0, 5), (4, 0), (5, 13)), varlen=True, sinks="some"),
}


def literal(shape: Shape, x: AttentionInputs, dlse: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """One query row of one head at a time: the softmax over its visible keys and a last logit, the sink."""
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    sinks = torch.full((shape.heads_q,), -math.inf) if x.sinks is None else x.sinks
    sinks = sinks.double().requires_grad_()
    scale = shape.head_dim**-0.5 if shape.softmax_scale is None else shape.softmax_scale
    starts_q = [0, *torch.tensor([n for n, _ in shape.lengths]).cumsum(0).tolist()]
    starts_k = [0, *torch.tensor([n for _, n in shape.lengths]).cumsum(0).tolist()]
    loss = torch.zeros((), dtype=torch.float64)
    o, lse = torch.zeros_like(x.do), torch.zeros((*x.do.shape[:-2], shape.heads_q), dtype=torch.float64)
    for b, (length_q, length_k) in enumerate(shape.lengths):
        for i in range(length_q):
            own = i + length_k - length_q
            seen = [j for j in range(length_k) if j <= own and (shape.window is None or own - j < shape.window)]
            at = starts_q[b] + i if shape.varlen else (b, i)
            keys = [starts_k[b] + j for j in seen] if shape.varlen else (b, seen)
            for h in range(shape.heads_q):
                g = h // (shape.heads_q // shape.heads_kv)
                if not seen and sinks[h] == -math.inf:
                    lse[at][h] = -math.inf
                    continue
                logits = torch.cat([scale * k[keys][:, g] @ q[at][h], sinks[h : h + 1]])
                row = torch.softmax(logits, 0)[:-1] @ v[keys][:, g]
                total = torch.log(torch.exp(logits).sum())
                o[at][h], lse[at][h] = row.detach(), total.detach()
                loss = loss + (row * x.do[at][h]).sum()
                if dlse is not None:
                    loss = loss + total * (dlse[h, at] if shape.varlen else dlse[b, h, i])
    leaves = (q, k, v, sinks)
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None,) * 4
    grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
    return dict(zip(OUTPUTS, (o, lse.T if shape.varlen else lse.transpose(1, 2), *grads), strict=True))


def by_autograd(shape: Shape, x: AttentionInputs, dlse: torch.Tensor | None) -> dict[str, torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.sinks) if t is not None]
    o, lse = attention_reference(*leaves, **shape.options(x))
    finite = lse.masked_fill(lse == -math.inf, 0.0)
    # Every leaf is in the loss, also where no row sees a key.
    loss = (o * x.do).sum() + sum(0.0 * leaf.nan_to_num().sum() for leaf in leaves)
    if dlse is not None:
        loss = loss + (finite * dlse).sum()
    grads = torch.autograd.grad(loss, leaves)
    return dict(zip(OUTPUTS, (o.detach(), lse.detach(), *grads), strict=False))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], sinks: bool) -> None:
    for name in OUTPUTS if sinks else OUTPUTS[:-1]:
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-6 if name == "dsinks" else 1e-11,
                                   atol=1e-12, msg=functools.partial("{}: {}".format, name))


@pytest.mark.parametrize("of_lse", [False, True], ids=["", "dlse"])
@pytest.mark.parametrize("name", SHAPES)
def test_both_references_equal_the_literal_softmax(name: str, of_lse: bool) -> None:
    shape = SHAPES[name]
    x = shape.inputs()
    lse_shape = (shape.heads_q, x.q.shape[0]) if shape.varlen else (x.q.shape[0], shape.heads_q, x.q.shape[1])
    dlse = torch.randn(lse_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if of_lse else None
    wanted = literal(shape, x, dlse)
    assert not any(w.isnan().any() for w in wanted.values()) and wanted["o"].shape == x.do.shape
    sinks = x.sinks is not None
    assert_same(by_autograd(shape, x, dlse), wanted, sinks)
    for row_chunk in (None, 3):
        explicit = attention_reference_gradients(
            x.q, x.k, x.v, x.sinks, x.do, dlse=dlse, row_chunk=row_chunk, **shape.options(x))
        assert_same(explicit, wanted, sinks)
        assert ("dsinks" in explicit) == sinks
        assert all(explicit[n].dtype == torch.float64 for n in explicit)


def test_rows_that_see_no_key() -> None:
    x = SHAPES["more queries"].inputs()
    assert x.sinks is not None
    out = attention_reference_gradients(x.q, x.k, x.v, x.sinks, x.do)
    assert torch.equal(out["o"][:, :14], torch.zeros(2, 14, 4, 16, dtype=torch.float64))
    assert torch.equal(out["lse"][:, :, :14], x.sinks.double()[None, :, None].expand(2, 4, 14))
    assert not out["dq"][:, :14].any() and out["dq"][:, 14:].any()
    assert not out["dsinks_rows"][..., :14].any()
    plain = attention_reference_gradients(x.q, x.k, x.v, None, x.do)
    assert (plain["lse"][..., :14] == -math.inf).all() and plain["lse"][..., 14:].isfinite().all()


def test_a_known_value() -> None:
    """Two keys with logits 0 and a sink of log 2: weights 1/4 and 1/4, lse log 4."""
    q, k = torch.zeros(1, 2, 1, 8), torch.ones(1, 2, 1, 8)
    v = torch.stack([torch.full((8,), 1.0), torch.full((8,), 3.0)])[None, :, None]
    o, lse = attention_reference(q, k, v, torch.tensor([math.log(2)], dtype=torch.float64))
    torch.testing.assert_close(o[0, :, 0, 0], torch.tensor([1 / 3, 1.0], dtype=torch.float64))
    torch.testing.assert_close(lse[0, 0], torch.tensor([3.0, 4.0], dtype=torch.float64).log())


def test_scales_are_the_size_of_the_terms() -> None:
    """Window 1 without a sink: p = 1, so dq = scale * (do.v - delta) * k cancels to zero and its terms do not."""
    x = Shape(((6, 6),), heads_q=1, heads_kv=1, window=1, sinks="none").inputs()
    out = attention_reference_gradients(x.q, x.k, x.v, None, x.do, window=1)
    dp = (x.do * x.v).sum(-1)
    # dp, delta = dp, and the products delta is the sum of.
    terms = (2 * dp**2 + ((x.do * x.v) ** 2).sum(-1)).sqrt()
    torch.testing.assert_close(out["dq_scale"], terms * x.k.norm(dim=-1) / 4)
    torch.testing.assert_close(out["dk_scale"], terms * x.q.norm(dim=-1) / 4)
    torch.testing.assert_close(out["dv_scale"], x.do.norm(dim=-1))
    torch.testing.assert_close(out["o_scale"], x.v.norm(dim=-1))
    assert out["dq"].abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["causal", "mqa", "window", "values wider", "fewer queries", "more queries",
                                  "no sinks, more queries", "some sinks, more queries", "varlen, other keys"])
def test_chunked_eager_rounds_where_autograd_of_eager_rounds(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    x = shape.inputs(dtype)
    lse_shape = (shape.heads_q, x.q.shape[0]) if shape.varlen else (x.q.shape[0], shape.heads_q, x.q.shape[1])
    dlse = torch.randn(lse_shape, generator=torch.Generator().manual_seed(1))
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.sinks) if t is not None]
    o, lse = eager_attention(*leaves, **shape.options(x), return_lse=True)
    assert o.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(eager_attention(*leaves, **shape.options(x)), o, rtol=0, atol=0)
    loss = (o.float() * x.do.float()).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    auto = [o, lse, *torch.autograd.grad(loss, leaves)]
    exact = attention_reference_gradients(x.q, x.k, x.v, x.sinks, x.do, dlse=dlse, **shape.options(x))
    for row_chunk in (None, 4):
        chunked = eager_gradients(x.q, x.k, x.v, x.sinks, x.do, dlse=dlse, row_chunk=row_chunk, **shape.options(x))
        for output, of_autograd in zip(OUTPUTS, auto, strict=False):
            # Sums in another order flip a rounding here and there; the error as a whole is the same.
            three = (chunked[output], of_autograd.detach(), exact[output])
            ours, theirs, truth = (t.double().masked_fill(t == -math.inf, 0.0) for t in three)
            # Autograd rounds dsinks again each time it adds another sequence's, or that of the rows that see no key.
            added = len(shape.lengths) if shape.varlen else 1
            slack = unit_roundoff(dtype) * added if output == "dsinks" else 1e-6
            assert (ours - theirs).norm() <= 0.25 * (theirs - truth).norm() + slack * truth.norm(), output


def test_half_arithmetic_of_the_reference() -> None:
    x = SHAPES["window"].inputs(torch.bfloat16)
    o, lse = attention_reference(x.q, x.k, x.v, x.sinks, window=5, dtype=torch.bfloat16)
    o64, lse64 = attention_reference(x.q, x.k, x.v, x.sinks, window=5)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (o64.dtype, lse64.dtype) == (torch.float64, torch.float64)
    assert 1e-4 < (o - o64).norm() / o64.norm() < 2**-6
    assert attention_reference(x.q, x.k, x.v, dtype=torch.float32)[1].dtype == torch.float32


@pytest.mark.parametrize(("change", "named"), [
    ({"q": torch.zeros(4, 2, 8)}, "q: expected 4 dimensions"),
    ({"k": torch.zeros(1, 4, 3, 8), "v": torch.zeros(1, 4, 3, 8)}, "k: expected a number of heads that divides q's 4"),
    ({"k": torch.zeros(1, 4, 2, 16)}, "k, v: shapes"),
    ({"sinks": torch.zeros(3)}, r"sinks: expected shape \(4,\), got \(3,\)"),
    ({"window": 0}, "window: expected None or at least 1, got 0"),
    ({"cu_seqlens_k": torch.tensor([0, 4])}, "cu_seqlens_k: expected None"),
    ({"do": torch.zeros(1, 4, 4, 9)}, "do: expected the shape of o"),
    ({"q": torch.zeros(4, 4, 8), "k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8),
      "cu_seqlens_q": torch.tensor([0, 3])}, "q: expected 3 tokens"),
    ({"q": torch.zeros(4, 4, 8), "k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8),
      "cu_seqlens_q": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 1, 4])}, "cu_seqlens_k: expected 2"),
])
def test_arguments_that_do_not_fit(change: dict[str, Any], named: str) -> None:
    arguments = {"q": torch.zeros(1, 4, 4, 8), "k": torch.zeros(1, 4, 2, 8), "v": torch.zeros(1, 4, 2, 8),
                 "sinks": None, "do": torch.zeros(1, 4, 4, 8)}
    with pytest.raises(ValueError, match=named):
        attention_reference_gradients(**(arguments | change))
