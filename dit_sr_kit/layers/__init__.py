"""The parts that networks are made of; no part knows a network."""
from dit_sr_kit.layers.adafm import AdaFM, FrequencyScale, PreparedSteps, adafm_kernel, adafm_matrix
from dit_sr_kit.layers.embeddings import TimestepEmbedder, timestep_embedding
from dit_sr_kit.layers.jit_blocks import BottleneckEmbed, RMSNorm, RotaryAttention, SwiGLU
from dit_sr_kit.layers.joint_attention import JointAttention, stream_maps
from dit_sr_kit.layers.modulation import AdaLNModulation, MapNorm, modulate
from dit_sr_kit.layers.preconditioning import ResidualPreconditioner
from dit_sr_kit.layers.windows import WindowAttention, window_attention_mask

__all__ = ["AdaFM", "AdaLNModulation", "BottleneckEmbed", "FrequencyScale", "JointAttention", "MapNorm",
           "PreparedSteps", "ResidualPreconditioner", "RMSNorm", "RotaryAttention", "SwiGLU",
           "TimestepEmbedder", "WindowAttention", "adafm_kernel", "adafm_matrix", "modulate", "stream_maps",
           "timestep_embedding", "window_attention_mask"]
