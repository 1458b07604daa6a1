"""The nearest rung's measure: which entries may be taken at all, and which of them is the nearest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_sink_attn.config import KERNELS, TileConfig
from flash_sink_attn.nearest import distance, family, nearest
from flash_sink_attn.tuned_table import Entry, ShapeKey

KEY = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, 128, 1, 8192, 8192)


def entry(key: ShapeKey = KEY, kernel: str = "fwd", config: TileConfig | None = None) -> Entry:
    return Entry(kernel, key, config or TileConfig(64, 32), 0.1, kernel, None, "case", "run")  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "same"), [
    ({"head_dim": 72}, False), ({"head_dim_v": 128}, False), ({"head_dim": 56}, True), ({"window": None}, False),
    ({"varlen": True}, False), ({"window": 4096}, True), ({"dtype": "float16"}, True), ({"heads_q": 8}, True),
    ({"batch": 9}, True), ({"seqlen_q": 1}, True)])
def test_what_makes_another_family(change, same):
    assert (family("fwd", KEY) == family("fwd", KEY._replace(**change))) is same
    assert family("fwd", KEY) != family("bwd_dq", KEY)


def test_distances_of_known_shapes():
    assert distance("fwd", KEY, KEY) == 0
    # an octave of work: 2; twice the heads besides: 1, and twice the group: 0.5
    assert distance("fwd", KEY, KEY._replace(batch=2)) == 2
    assert distance("fwd", KEY, KEY._replace(seqlen_q=4096)) == 2
    assert distance("fwd", KEY, KEY._replace(heads_q=32)) == 2 + 1 + 0.5
    assert distance("fwd", KEY, KEY._replace(dtype="float16")) == 0.5
    assert distance("fwd", KEY, KEY._replace(window=256)) == 0.5
    assert distance("fwd", KEY, KEY._replace(seqlen_k=4096)) == 0          # the window hides the rest
    causal = KEY._replace(window=None)
    assert distance("fwd", causal, causal._replace(seqlen_k=4096)) == 0.5
    # the programs of bwd_dkdv are over keys and key heads
    assert distance("bwd_dkdv", KEY, KEY._replace(seqlen_q=4096)) == 0
    assert distance("bwd_dkdv", KEY, KEY._replace(heads_kv=4)) == 2 + 0.5


KEYS = st.builds(
    lambda d, g, kv, w, b, q, k, t: ShapeKey.fixed(d, 64, 64, g * kv, kv, w, b, q, k)._replace(varlen=t),
    st.sampled_from(["bfloat16", "float16"]), st.integers(1, 8), st.integers(1, 16),
    st.none() | st.integers(1, 4096), st.integers(1, 64), st.integers(1, 1 << 17), st.integers(1, 1 << 17),
    st.booleans())


@given(KEYS, KEYS, KEYS, st.sampled_from(KERNELS))
def test_it_is_a_distance(a, b, c, kernel):
    assert distance(kernel, a, a) == 0
    assert distance(kernel, a, b) == distance(kernel, b, a) >= 0
    assert distance(kernel, a, c) <= distance(kernel, a, b) + distance(kernel, b, c) + 1e-9


def test_the_nearest_of_the_family_that_is_usable():
    near, far = entry(KEY._replace(seqlen_q=4096, seqlen_k=4096)), entry(KEY._replace(seqlen_q=1024, seqlen_k=1024))
    strangers = [entry(KEY._replace(window=None)), entry(KEY, "bwd_dq"), entry(KEY._replace(head_dim=128))]
    everything = [far, *strangers, near]
    assert nearest("fwd", KEY, everything, lambda e: True) == (near, 2.0)
    assert nearest("fwd", KEY, everything, lambda e: e is not near) == (far, 6.0)
    assert nearest("fwd", KEY, strangers, lambda e: True) is None


def test_of_equally_near_ones_the_one_with_more_work_whatever_the_order():
    less, more = entry(KEY._replace(batch=1, seqlen_q=4096)), entry(KEY._replace(batch=2))
    assert nearest("fwd", KEY, [less, more], lambda e: True) == nearest("fwd", KEY, [more, less], lambda e: True)
    assert nearest("fwd", KEY, [less, more], lambda e: True) == (more, 2.0)
