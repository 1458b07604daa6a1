"""Which config to run on the machine at hand."""

from __future__ import annotations

from pathlib import Path

from flash_sink_attn.devices import gpu_slug

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def choose_config(gpu: str, configs: Path = CONFIGS) -> tuple[Path, str]:
    """The config made for a machine, and why it is this one.

    Args:
        gpu: the GPU's name as the driver gives it, "cpu" = none.
        configs: where the configs lie; default the checkout's.

    Returns:
        ``cpu.yaml`` without a GPU, the card's own (``h100.yaml`` for an "NVIDIA H100 80GB HBM3") where there is one,
        else ``quick.yaml``; and the reason in words.

    Raises:
        FileNotFoundError: that config does not exist, as in an installation without a checkout.
    """
    if gpu == "cpu":
        chosen, why = configs / "cpu.yaml", "this machine has no GPU that PyTorch can use"
    else:
        chosen, why = configs / f"{gpu_slug(gpu)}.yaml", f"made for the {gpu} of this machine"
        if not chosen.is_file():
            chosen, why = configs / "quick.yaml", f"there is no {chosen.name} for the {gpu} of this machine"
    if not chosen.is_file():
        raise FileNotFoundError(f"CONFIG.yaml: auto expected {chosen}, which does not exist; name a config")
    return chosen, why
