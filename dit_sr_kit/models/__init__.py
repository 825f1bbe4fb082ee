"""The networks, and the autoencoders they work in."""
from dit_sr_kit.models.dit_sr import DiTSR

__all__ = ["DiTSR"]
