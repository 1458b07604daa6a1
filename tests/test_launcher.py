"""What a launch asks Triton for beyond what Triton's own way would."""

from __future__ import annotations

import types
from typing import Any

from flash_sink_attn import launcher
from tests.fake_kernels import Compiled, Kernel


def test_a_cluster_is_launched_by_their_number() -> None:
    """The launcher multiplies the grid by what the metadata say; a kernel that is launched again is not multiplied
    again."""
    kernel = Kernel(types.SimpleNamespace(__name__="a kernel", arg_names=["x"]))
    compiled = Compiled("a kernel")
    kernel.warmup = lambda **arguments: compiled  # type: ignore[method-assign]

    def launched(programs: int, **how: Any) -> Any:
        return launcher._launch_new(kernel, programs, [7], {"SIZE": 3}, {"num_warps": 4}, None, None, **how)

    assert launched(5, cluster=2) is launched(6, cluster=2) is compiled
    assert compiled.packed_metadata == (4, 2, 0)
    assert compiled.listened == [((5, 1, 1), 7, 3), ((6, 1, 1), 7, 3)] and not kernel.first
    launched(5)
    assert kernel.first == [{"x": 7, "SIZE": 3, "num_warps": 4}]
