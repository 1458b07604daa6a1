"""What is known of each card: peaks from its data sheet, ceilings from our own measurements."""

from __future__ import annotations

import dataclasses

from flash_sink_attn.devices import gpu_slug


@dataclasses.dataclass(frozen=True)
class Card:
    """One GPU model.

    Attributes:
        name: the short name used in configs.
        slug: what :func:`gpu_slug` makes of the driver's name for it.
        arch: compute capability, major * 10 + minor.
        sms: streaming multiprocessors. A card cut down to fewer (MIG, a virtual GPU) is not this card.
        peak_tflops: dense fp16 and bf16 tensor-core rate of the data sheet, TFLOP/s.
        peak_tb_per_s: memory bandwidth of the data sheet, TB/s.
        smem_per_block: shared memory one block may use, bytes.
        copy_tb_per_s: measured rate of a large copy, TB/s, read plus written; None = not measured.
        gemm_tflops: measured rate of a large bf16 matrix product, TFLOP/s; None = not measured.
        boost_mhz: highest SM clock of the data sheet, MHz; what the card runs at while power and temperature allow.
    """

    name: str
    slug: str
    arch: int
    sms: int
    peak_tflops: float
    peak_tb_per_s: float
    smem_per_block: int
    copy_tb_per_s: float | None = None
    gemm_tflops: float | None = None
    boost_mhz: float | None = None

    @property
    def ceiling_tflops(self) -> float:
        """The measured GEMM rate, else the data sheet's; TFLOP/s."""
        return self.gemm_tflops or self.peak_tflops

    @property
    def ceiling_tb_per_s(self) -> float:
        """The measured copy rate, else the data sheet's; TB/s."""
        return self.copy_tb_per_s or self.peak_tb_per_s


CARDS = (
    Card("H100", "h100", 90, 132, 989.4, 3.35, 232448, copy_tb_per_s=3.02, gemm_tflops=754.0, boost_mhz=1980),
    Card("H100 PCIe", "h100-pcie", 90, 114, 756.0, 2.0, 232448, boost_mhz=1755),
    Card("H100 NVL", "h100-nvl", 90, 132, 835.5, 3.9, 232448, boost_mhz=1785),
    Card("H200", "h200", 90, 132, 989.4, 4.8, 232448, boost_mhz=1980),
    Card("H20", "h20", 90, 78, 148.0, 4.0, 232448, boost_mhz=1980),
    Card("A100 SXM 80GB", "a100-sxm4-80gb", 80, 108, 312.0, 2.039, 166912, boost_mhz=1410),
    Card("L40S", "l40s", 89, 142, 362.05, 0.864, 101376, boost_mhz=2520),
    Card("RTX 4090", "rtx-4090", 89, 128, 165.2, 1.008, 101376, boost_mhz=2520),
)


def find_card(gpu_name: str, sms: int | None = None) -> Card | None:
    """The card of a driver's GPU name ("NVIDIA H100 80GB HBM3"), or of a config's short one ("H100").

    Returns None for a card not in the table, and for one whose number of SMs (when given) is not the table's: its peaks
    would be wrong, and a wrong peak is worse than none.
    """
    slug = gpu_slug(gpu_name)
    for card in CARDS:
        if slug in (card.slug, gpu_slug(card.name)) and sms in (None, card.sms):
            return card
    return None
