"The network, its two layers that have two forms each, and one restoration."
import time

import torch

from tests.bench import milliseconds, seconds


def _noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def adafm(quick):
    "AdaFM as a matrix and through the FFT: the same numbers, at two speeds."
    from dit_sr_kit.layers.adafm import AdaFM

    scale = _noise(1, 8, 5)
    for channels in (64, 192):
        x = _noise(1, channels, 64, 64)
        matrix, fft = AdaFM(8, "matrix"), AdaFM(8, "fft")
        a, b = seconds(lambda: matrix(x, scale), lambda: fft(x, scale), repeat=3 if quick else 31)
        difference = (matrix(x, scale) - fft(x, scale)).abs().max().item()
        yield f"AdaFM [1,{channels},64,64]", f"{milliseconds(a)} / {milliseconds(b)}", \
            f"matrix / FFT: {b / a:.2f} times as fast, largest difference {difference:.1e}"


@torch.no_grad()
def attention(quick):
    "Window attention by PyTorch's fused kernel and with the softmax written out."
    from dit_sr_kit.layers.windows import WindowAttention

    for channels, heads, shift in ((64, 4, 0), (192, 6, 4)):
        x = _noise(1, channels, 64, 64)
        fused = WindowAttention(channels, heads, 8, shift).eval()
        explicit = WindowAttention(channels, heads, 8, shift, impl="explicit").eval()
        explicit.load_state_dict(fused.state_dict())
        a, b = seconds(lambda: fused(x), lambda: explicit(x), repeat=3 if quick else 31)
        difference = (fused(x) - explicit(x)).abs().max().item()
        yield f"attention [1,{channels},64,64], shift {shift}", f"{milliseconds(a)} / {milliseconds(b)}", \
            f"fused / explicit: {b / a:.2f} times as fast, largest difference {difference:.1e}"


def tiny_pipeline():
    "The pipeline of dit-sr-tiny; without its weights one of the same size, which is as fast."
    from dit_sr_kit import SRPipeline, WeightsUnavailable
    from dit_sr_kit.models.autoencoders import SpaceToDepth
    from dit_sr_kit.presets import build
    from dit_sr_kit.schedulers import ResShiftScheduler

    try: return SRPipeline.from_preset("dit-sr-tiny", device="cpu"), "bundled weights"
    except WeightsUnavailable:
        return SRPipeline(build("dit-sr-tiny"), ResShiftScheduler(), SpaceToDepth(4)), "random weights"


def restore(quick):
    "One restoration, as a user sees it."
    from dit_sr_kit.images import resize, sample_image

    pipe, weights = tiny_pipeline()
    side, steps = (32, 2) if quick else (128, 15)
    lr = resize(sample_image("chelsea"), size=(side, side), mode="area")
    pipe(lr[..., :16, :16], num_inference_steps=1, seed=0, progress=False)
    start = time.perf_counter()
    pipe(lr, num_inference_steps=steps, seed=0, progress=False)
    taken = time.perf_counter() - start
    yield f"dit-sr-tiny {side} to {4 * side}, {steps} steps", f"{taken:.1f} s", f"{taken / steps:.2f} s a step, {weights}"
