"""A call that is replayed launches what the same call done in full launches."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flash_sink_attn import calls, dispatch, flash_sink_attn_func, flash_sink_attn_varlen_func, launcher, replay
from flash_sink_attn._mode import triton
from flash_sink_attn.config import AttnConfig, TileConfig
from flash_sink_attn.launcher import is_descriptor
from tests import fake_kernels
from tests.fake_kernels import Kernel, tensors

PLAIN, TMA = TileConfig(32, 32, 4, 2), TileConfig(32, 32, 4, 2, TMA=True, REGISTER_A=True)
PACKED = AttnConfig(fwd=TileConfig(32, 32, PACK_GQA=True, TMA=True, REGISTER_A=True), bwd_dq=TMA, bwd_dkdv=PLAIN)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Kernel]]:
    dispatch.forget()
    yield fake_kernels.install(monkeypatch)
    dispatch.forget()  # what was recorded holds the fakes


def step(call: dict[str, Any], seed: int, requires: str = "qkvs", varlen: bool = False) -> dict[str, torch.Tensor]:
    """One forward and backward on fresh tensors; ``hooks`` in ``call``: on what the forward saves."""
    torch.manual_seed(seed)
    q, k, v, sinks = tensors(batch=2, seqlen=48)
    options = dict(call)
    hooks = options.pop("hooks", (lambda x: x, lambda x: x))
    if options.pop("packed", False):
        q, k, v = torch.cat([q, k, v], 2).split([4, 2, 2], 2)
    window, lse = options.pop("window", None), options.pop("lse", False)
    if options.pop("no_sinks", False):
        sinks = None  # type: ignore[assignment]
    given = {"q": q, "k": k, "v": v, "s": sinks}
    if varlen:
        given |= {name: given[name].flatten(0, 1) for name in "qkv"}
    wanted = [given[name].requires_grad_() for name in requires if given[name] is not None]
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        if varlen:
            cu = torch.tensor([0, 40, 96], dtype=torch.int32)
            out = flash_sink_attn_varlen_func(*(given[n] for n in "qkvs"), cu, window, return_lse=lse, **options)
        else:
            out = flash_sink_attn_func(*(given[n] for n in "qkvs"), window, return_lse=lse, **options)
    if wanted:
        grads = torch.autograd.grad(out, wanted, [torch.ones_like(x) for x in out] if lse else torch.ones_like(out))
        assert [g.shape for g in grads] == [x.shape for x in wanted]
    return {name: x for name, x in given.items() if x is not None}


_ADDRESS = 1 << 24  # above every length and stride here, and below what the smallest heap begins at


def in_plain(x: Any, own: dict[int, str]) -> Any:
    """An argument of a launch as something to compare: a tensor of the call by its name, any other by its being one."""
    if isinstance(x, torch.Tensor):
        return own.get(x.data_ptr(), "made by the call")
    if is_descriptor(x):
        return in_plain(x.base if isinstance(x.base, torch.Tensor) else x.base.data_ptr(), own), x.shape, x.strides, \
            x.block_shape
    if isinstance(x, int) and not isinstance(x, bool) and x > _ADDRESS:
        return own.get(x, "made by the call")
    return x


def launches_of(kernels: dict[str, Kernel], x: dict[str, torch.Tensor]) -> list[list[Any]]:
    """What was launched since the last look, in full or replayed."""
    own = {t.data_ptr(): name for name, t in x.items()}
    found = []
    for kernel in kernels.values():
        for arguments in kernel.first:
            found.append([kernel.__name__, *(in_plain(a, own) for n, a in arguments.items()
                                             if n not in ("num_warps", "num_stages", "maxnreg"))])
        kernel.first.clear()
        for compiled in kernel.compiled.values():
            for _, *arguments in compiled.listened:
                found.append([kernel.__name__, *(in_plain(a, own) for a in arguments)])
            compiled.listened.clear()
    return sorted(found, key=lambda launch: launch[0])


CASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "plain": ({"config": PLAIN}, "qkvs", False),
    "copy engine": ({"config": TMA, "window": 9}, "qkvs", False),
    "packed heads": ({"config": PACKED}, "qkvs", False),
    "no sinks": ({"config": TMA, "no_sinks": True}, "qkv", False),
    "lse too": ({"config": TMA, "lse": True}, "qkvs", False),
    "one gradient": ({"config": TMA}, "k", False),
    "the sinks' gradient alone": ({"config": TMA}, "s", False),
    "no gradient": ({"config": TMA}, "", False),
    "varlen": ({"config": PLAIN, "window": 9}, "qkvs", True),
    "varlen by the copy engine": ({"config": TMA}, "qkvs", True),
    "the heuristic": ({"window": 9}, "qkvs", False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_replay_launches_what_the_call_in_full_does(kernels: dict[str, Kernel], name: str) -> None:
    call, requires, varlen = CASES[name]
    step(call, 1, requires, varlen)
    launches_of(kernels, {})
    x = step(call, 2, requires, varlen)
    # the sinks' gradient alone is summed up by PyTorch
    assert any(kernel.first for kernel in kernels.values()) is (requires == "s")
    replayed = launches_of(kernels, x)
    dispatch.forget()
    assert replayed == launches_of(kernels, step(call, 3, requires, varlen))
    assert len(replayed) == {"": 1, "s": 2}.get(requires, 3)


DENSE = (lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x)
ACROSS = (lambda x: x if x.dim() < 2 else x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x)


@pytest.mark.parametrize("order", ["kept dense kept dense", "dense kept dense kept", "kept across kept across",
                                   "across dense across kept"])
@pytest.mark.parametrize("config", [PLAIN, TMA], ids=["plain", "copy engine"])
@pytest.mark.parametrize("varlen", [False, True])
def test_hooks_may_give_back_other_strides_than_were_saved(
    kernels: dict[str, Kernel], varlen: bool, config: TileConfig, order: str
) -> None:
    """Activation offloading does: what was a slice of a packed tensor comes back dense."""
    ways: dict[str, Any] = {"kept": {}, "dense": {"hooks": DENSE}, "across": {"hooks": ACROSS}}
    call = {"config": config, "packed": True}
    found = [launches_of(kernels, step(call | ways[way], 1, varlen=varlen)) for way in order.split()]
    for way, launched in zip(order.split(), found, strict=True):
        dispatch.forget()
        assert launched == launches_of(kernels, step(call | ways[way], 1, varlen=varlen))


def test_a_hook_that_gives_back_something_else_is_told() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=r"k: expected what was saved for the backward, torch.bfloat16 "
                                             r"\(2, 48, 2, 64\) on cpu, got torch.float32 \(2, 48, 2, 64\)"):
            step({"hooks": (lambda x: x, lambda x: x.float() if x.shape == (2, 48, 2, 64) else x)}, 1)
        step({}, 1)


def test_only_the_first_call_of_a_kind_is_done_in_full(kernels: dict[str, Kernel]) -> None:
    for seed in range(4):
        step({"window": 9}, seed)
    assert [len(kernel.first) for kernel in kernels.values()] == [1, 1, 1]
    assert [len(c.listened) for kernel in kernels.values() for c in kernel.compiled.values()] == [3, 3, 3]
    step({"window": 10}, 5)
    assert [len(kernel.first) for kernel in kernels.values()] == [2, 2, 2]


def test_the_short_way_to_the_driver(kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own arguments, then the kernel's; a descriptor is a tensor map with its shape and strides."""
    fake_kernels.install_direct(monkeypatch)
    step({"config": TMA}, 1, "")
    x = step({"config": TMA}, 2, "")
    (compiled,) = kernels["fwd_kernel"].compiled.values()
    (arguments,) = compiled.direct
    assert not compiled.listened
    assert arguments[:13] == (16, 1, 1, 77, 1234, False, False, None, None, (4, 1, 0), None, None, None)
    q, k, v, sinks = (x[name].data_ptr() for name in "qkvs")
    strides = [48 * 4 * 64, 4 * 64, 64, 1]
    assert list(arguments[13:22]) == [f"map at {q}", 2, 48, 4, 64, *strides]
    assert arguments[22] == f"map at {k}" and arguments[31] == f"map at {v}"
    assert arguments[40:42] == (None, None) and arguments[42] == sinks     # no tail without packed sequences
    assert all(isinstance(a, int) for a in arguments[43:45]) and arguments[45:47] == (None, None)


def test_tensor_maps_are_made_once_per_address(kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def encoder(descriptor: Any, number: int) -> Any:
        return lambda address: (made.append(address), "a map")

    monkeypatch.setattr(replay, "launcher_of", lambda compiled: replay.Launcher(
        lambda *arguments: None, False, False, lambda: 0, encoder))
    monkeypatch.setattr(replay, "_MAPS", 3)
    x = [tensors() for _ in range(5)]
    for q, k, v, sinks in [x[0], *x, *x[-2:]]:
        flash_sink_attn_func(q, k, v, sinks, config=TileConfig(32, 32, TMA=True))
    # the first call is done in full; k and v of five addresses, of which at most three are kept
    assert len(made) == 10


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_listens_to_launches_hears_them(
    kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    fake_kernels.install_direct(monkeypatch)
    for seed in range(2):
        step({"config": PLAIN}, seed, "")
    (compiled,) = kernels["fwd_kernel"].compiled.values()
    chain = getattr(triton.knobs.runtime, hook)
    listener = lambda *_: None  # noqa: E731
    if hasattr(chain, "add"):
        chain.add(listener)
    else:
        monkeypatch.setattr(triton.knobs.runtime, hook, listener)
    try:
        step({"config": PLAIN}, 3, "")
    finally:
        if hasattr(chain, "remove"):
            chain.remove(listener)
    assert len(compiled.direct) == len(compiled.listened) == 1
    step({"config": PLAIN}, 4, "")
    assert len(compiled.direct) == 2


def test_the_installed_tritons_launcher_is_known_or_left_alone() -> None:
    assert replay.launcher_of(fake_kernels.Compiled("a kernel")) is None


def test_what_is_not_aligned_is_done_in_full(kernels: dict[str, Kernel]) -> None:
    q, k, v, sinks = tensors()
    flash_sink_attn_func(q, k, v, sinks)
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    for _ in range(2):
        flash_sink_attn_func(q, odd, v, sinks)
    flash_sink_attn_func(q, k, v, sinks)
    assert len(kernels["fwd_kernel"].first) == 3
    assert sum(len(c.listened) for c in kernels["fwd_kernel"].compiled.values()) == 1


def test_a_recording_of_unaligned_tensors_is_not_kept(kernels: dict[str, Kernel]) -> None:
    q, k, v, sinks = tensors()
    odd = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    for key in (odd, k, k):
        flash_sink_attn_func(q, key, v, sinks)
    assert len(kernels["fwd_kernel"].first) == 2


def test_one_tensor_for_two_arguments_is_done_in_full(kernels: dict[str, Kernel]) -> None:
    """Which of the two a launch took it for cannot be told."""
    q, k, v, sinks = tensors()
    flash_sink_attn_func(q, k, k, sinks, config=PLAIN)
    flash_sink_attn_func(q, k, v, sinks, config=PLAIN)
    assert kernels["fwd_kernel"].first[1]["V"] is v


def test_inputs_that_are_copied_first_are_done_in_full(kernels: dict[str, Kernel]) -> None:
    q, k, v, sinks = tensors()
    turned = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    for _ in range(2):
        flash_sink_attn_func(q, k, turned, sinks)
    assert len(kernels["fwd_kernel"].first) == 2


def test_arguments_are_checked_whatever_came_before(kernels: dict[str, Kernel]) -> None:
    """1, 1.0 and True are equal as keys of a dictionary."""
    q, k, v, sinks = tensors()
    flash_sink_attn_func(q, k, v, sinks, 1, softmax_scale=1.0)
    with pytest.raises(TypeError, match="window"):
        flash_sink_attn_func(q, k, v, sinks, True, softmax_scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="softmax_scale"):
        flash_sink_attn_func(q, k, v, sinks, 1, softmax_scale=True)
    with pytest.raises(TypeError, match="v: expected a tensor"):
        flash_sink_attn_func(q, k, 3, sinks, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config"):
        flash_sink_attn_func(q, k, v, sinks, 1, config=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="impl: expected one of"):
        flash_sink_attn_func(q, k, v, sinks, 1, impl="cuda")  # type: ignore[arg-type]


def test_kinds_of_calls_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MOST", 3)
    for seqlen in range(16, 24):
        flash_sink_attn_func(*tensors(seqlen=seqlen))
    assert len(calls._calls) <= 3


def test_temporaries_of_a_replay_do_not_overlap() -> None:
    device = torch.device("cpu")
    out = torch.empty(4)
    compiled = fake_kernels.Compiled("a kernel")
    with launcher.recording([out], device) as recorder:
        a = launcher.workspace((3, 8), torch.float32, device)
        b = launcher.workspace((7,), torch.float32, device)
        zeros = launcher.workspace((9,), torch.int32, device, zero=True)
        recorder.note(compiled, 1, [out, a, a[1], b, zeros, 5], {"X": 1})
    assert not zeros.any()
    tape = recorder.tape()
    assert tape is not None and (tape.workspace, tape.zeroed) == (512, 256)
    assert tape.play([out])
    ((_, to, first, second, third, zeroed, five, constant),) = compiled.listened
    assert to == out.data_ptr() and second - first == 32 and third - first == 256
    assert zeroed not in range(first, first + 512) and (five, constant) == (5, 1)


def test_a_tensor_from_nowhere_is_not_replayed() -> None:
    device = torch.device("cpu")
    with launcher.recording([torch.empty(4)], device) as recorder:
        recorder.note(fake_kernels.Compiled("a kernel"), 1, [torch.empty(3)], {})
    assert recorder.tape() is None and "neither an argument" in str(recorder.problem)


def test_the_launcher_of_triton_3_6(kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own expansion of the arguments is what the short way hands to its C function."""
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("is about another Triton")
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 32, 1, 64], "fp4_padded": False}
    utils = types.SimpleNamespace(fill_tma_descriptor=lambda address, *rest: ("map", address, *map(str, rest)))
    active = types.SimpleNamespace(utils=utils, get_current_device=lambda: 0, get_current_stream=lambda device: 77)
    monkeypatch.setattr(triton.runtime.driver, "set_active", None, raising=False)
    monkeypatch.setattr(type(triton.runtime.driver), "active", active)
    signature = {i: "tensordesc<bf16[1,32,1,64]>" if i < 3 else "*fp32" for i in range(8)}
    given: list[tuple[Any, ...]] = []
    launcher_class = object.__new__(nvidia.CudaLauncher)
    launcher_class.__dict__.update(
        launch=nvidia.wrap_handle_tensordesc(given.append, signature, [meta] * 3), num_ctas=1, global_scratch_size=0,
        profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=True)
    step({"config": TMA}, 1, "")
    (compiled,) = kernels["fwd_kernel"].compiled.values()
    compiled.metadata.tensordesc_meta, compiled.run = [meta] * 3, launcher_class  # type: ignore[attr-defined]
    look = replay.launcher_of
    found = look(compiled)
    assert found is not None and found.function == given.append
    assert (found.cooperative, found.dependent, found.stream()) == (False, True, 77)
    monkeypatch.setattr(replay, "launcher_of", lambda compiled: found._replace(
        function=lambda *arguments: given.append(arguments)))
    x = step({"config": TMA}, 2, "")
    (short,) = given
    given.clear()
    own = nvidia.wrap_handle_tensordesc(lambda *arguments: given.append(arguments), signature, [meta] * 3)
    q, k, v = (replay._At(x[name].data_ptr()) for name in "qkv")
    described = [types.SimpleNamespace(base=base, shape=list(x[name].shape), strides=list(x[name].stride()),
                                       padding="zero") for name, base in zip("qkv", (q, k, v), strict=True)]
    own(*short[:13], *described, *short[40:])
    assert given == [short]
    for wrong in ({"global_scratch_size": 1}, {"launch": lambda *arguments: None}):
        compiled.run = object.__new__(nvidia.CudaLauncher)  # type: ignore[attr-defined]
        compiled.run.__dict__.update(launcher_class.__dict__, **wrong)  # type: ignore[attr-defined]
        assert look(compiled) is None


def test_integers_that_a_kernel_is_specialised_on_are_told_apart() -> None:
    """Triton compiles a kernel of its own for 1 and for multiples of 16, unless it is told not to."""
    params = [types.SimpleNamespace(do_not_specialize=told) for told in (False, True, False)]

    class Of:
        def __init__(self) -> None:
            self.params = params

    assert launcher._specialised(Of()) == {0, 2}
