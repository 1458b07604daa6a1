"""The short name under which a card's tuned table and results are filed."""

from __future__ import annotations

import re

_MAKER = ("nvidia", "geforce", "tesla")
# The one card whose usual name ("H100") is shorter than the driver's; every other word of a name (PCIe, NVL, SXM4, a
# memory size) tells cards of different speed apart and stays.
_USUAL = {"h100-80gb-hbm3": "h100"}


def gpu_slug(name: str) -> str:
    """File-name form of a GPU's name: lower-case letters, digits and hyphens, without the maker.

    ``"NVIDIA H100 80GB HBM3"`` gives ``"h100"``, ``"NVIDIA H100 PCIe"`` gives ``"h100-pcie"``, ``"NVIDIA H20"`` gives
    ``"h20"``: cards that differ in speed never share a slug, whatever their architecture.

    Raises:
        ValueError: the name holds no letter or digit.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    if not words:
        raise ValueError(f"name: expected the name of a GPU such as 'NVIDIA H100 80GB HBM3', got {name!r}")
    slug = "-".join([word for word in words if word not in _MAKER] or words)
    return _USUAL.get(slug, slug)
