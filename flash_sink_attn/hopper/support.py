"""Whether the Hopper kernels can run: this Triton's Gluon, the device, the tensors. Each "no" is said in words.

Nothing here imports a kernel, so it can be asked where they cannot even be defined.
"""

from __future__ import annotations

import functools
import importlib

import torch

from flash_sink_attn._mode import INTERPRETING, triton
from flash_sink_attn.layout import describable

ARCH = 90
# The Tritons with which the kernels are known to build; tests compile them for Hopper. Gluon is experimental, and one
# that has every name below may still mean something else by it.
VERSIONS = ("3.6",)
# What the kernels use of Gluon, by module.
_GLUON = "triton.experimental.gluon"
_NEEDED: dict[str, tuple[str, ...]] = {
    _GLUON: ("jit",),
    f"{_GLUON}.language": (
        "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout", "allocate_shared_memory",
        "convert_layout", "inline_asm_elementwise", "warp_specialize"),
    f"{_GLUON}.language.nvidia.hopper": ("fence_async_shared", "mbarrier", "tma", "warpgroup_mma",
                                         "warpgroup_mma_wait"),
    f"{_GLUON}.language.nvidia.hopper.tma": ("async_copy_global_to_shared", "async_copy_shared_to_global",
                                             "store_wait"),
    f"{_GLUON}.language.nvidia.hopper.mbarrier": ("MBarrierLayout", "arrive", "expect", "init", "wait"),
    f"{_GLUON}.nvidia.hopper": ("TensorDescriptor",),
}


@functools.cache
def gluon_problem() -> str | None:
    """Why the installed Triton's Gluon cannot build the kernels, None = it can."""
    if ".".join(triton.__version__.split(".")[:2]) not in VERSIONS:
        return f"they are known to build with Triton {' and '.join(VERSIONS)}, this is {triton.__version__}"
    for module, names in _NEEDED.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            return f"Triton {triton.__version__} has no {module}"
        missing = next((name for name in names if not hasattr(found, name)), None)
        if missing is not None:
            return f"Gluon of Triton {triton.__version__} has no {module.removeprefix(_GLUON).lstrip('.')}.{missing}"
    return None


@functools.lru_cache(maxsize=64)
def device_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, None = they can. "meta" stands for a Hopper card to compile for."""
    if INTERPRETING:
        return "Triton's interpreter has no Gluon"
    if device.type == "meta":
        return gluon_problem()
    if device.type != "cuda":
        return f"they need a CUDA device of compute capability {ARCH / 10}, got {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor != ARCH:
        return f"they need compute capability {ARCH / 10}, the device has {major}.{minor}"
    return gluon_problem()


def tensors_problem(**tensors: torch.Tensor) -> str | None:
    """Why the copy engine cannot read one of the tensors, by its name; None = it can read all of them.

    Each is (..., head_dim) in any order of its other dimensions: aligned to 16 bytes, its last dimension contiguous,
    its other strides multiples of 16 bytes and not 0, none of its dimensions empty.
    """
    for name, x in tensors.items():
        if x.stride(-1) != 1 or not describable(x):
            return (f"the copy engine cannot read {name}: its start and strides must be multiples of 16 bytes, its "
                    f"last dimension contiguous and none empty, a packed batch below 2**30 tokens, got shape "
                    f"{tuple(x.shape)} with strides {tuple(x.stride())}")
    return None
