"""What a call asks for besides its tensors: tiles, an implementation, determinism."""

from __future__ import annotations

import dataclasses

from flash_sink_attn.config import AttnConfig, Impl


@dataclasses.dataclass(frozen=True)
class Options:
    """How a call is to be done; None leaves it to the tuned table and the heuristic.

    Attributes:
        config: tiles of some kernels.
        impl: whose kernels.
        deterministic: True = gradients that are the same bits each time.
    """

    config: AttnConfig | None = None
    impl: Impl | None = None
    deterministic: bool | None = None

    def encode(self) -> str:
        """As text that :meth:`decode` reads, "" for nothing asked; plain enough for torch.compile to trace."""
        if self.config is None and self.impl is None and self.deterministic is None:
            return ""
        config = "" if self.config is None else self.config.encode()
        deterministic = "" if self.deterministic is None else "yes" if self.deterministic else "no"
        return f"{self.impl or ''}|{deterministic}|{config}"

    @classmethod
    def decode(cls, text: str) -> Options:
        """The inverse of :meth:`encode`."""
        if not text:
            return cls()
        impl, deterministic, config = text.split("|")
        return cls(AttnConfig.decode(config) if config else None, impl or None,  # type: ignore[arg-type]
                   {"": None, "yes": True, "no": False}[deterministic])
