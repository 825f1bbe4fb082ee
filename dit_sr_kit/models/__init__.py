"""The networks, and the autoencoders they work in."""
from dit_sr_kit.models.dit4sr import DiT4SR
from dit_sr_kit.models.dit_sr import DiTSR
from dit_sr_kit.models.dossr import DoSSRControlNet
from dit_sr_kit.models.dossr_system import DoSSRSystem
from dit_sr_kit.models.jit_sr import JiT, JiTSR
from dit_sr_kit.models.resshift_unet import ResShiftUNet
from dit_sr_kit.models.rrdbnet import RRDBNet
from dit_sr_kit.models.vq_autoencoder import VQAutoencoder

__all__ = ["DiT4SR", "DiTSR", "DoSSRControlNet", "DoSSRSystem", "JiT", "JiTSR", "ResShiftUNet", "RRDBNet",
           "VQAutoencoder"]
