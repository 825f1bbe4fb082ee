"The network as the specification reads against the fast one: same weights, same inputs, one process, taking turns."
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tests.bench import milliseconds, wall_and_cpu


def _noise(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


class PlainPixelConv(nn.Conv2d):
    "A 1 x 1 convolution as PyTorch runs it."


def plain_copy(model):
    "The plain reading: Fourier transform, softmax written out, convolutions, rows and columns last in memory."
    from dit_sr_kit.layers import AdaFM, MapNorm, WindowAttention
    from dit_sr_kit.models.dit_sr import DiTSR, PixelConv

    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, AdaFM): module.impl = "fft"
        if isinstance(module, WindowAttention): module.impl = "explicit"
        if isinstance(module, PixelConv): module.__class__ = PlainPixelConv
        if isinstance(module, MapNorm): module.__class__ = nn.GroupNorm
    if isinstance(plain, DiTSR):
        plain.conv_in.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    return plain


def _rows(label, plain, fast, repeat, warm=True):
    "One line: median times of both, their ratios, and how far the results are apart."
    results = {}
    calls = (lambda: results.update(want=plain()), lambda: results.update(got=fast()))
    wall, cpu = wall_and_cpu(*calls, repeat=repeat, warm=warm)
    want, got = results["want"], results["got"]
    return (label, f"{milliseconds(wall[0])} / {milliseconds(wall[1])}",
            f"{wall[0] / wall[1]:.2f} times as fast; processor {milliseconds(cpu[0])} / {milliseconds(cpu[1])}: "
            f"{cpu[0] / cpu[1]:.2f}; largest difference {(want - got).abs().max():.1e}, output std {want.std():.2g}")


@torch.no_grad()
def modules(quick):
    "Parts of the full-size network, plain / fast, on a map [1,192,64,64]."
    from dit_sr_kit.layers import AdaFM
    from dit_sr_kit.models.dit_sr import AdaFMBlock

    side, repeat = (16, 1) if quick else (64, 9)
    torch.manual_seed(0)
    x, temb = _noise(1, 192, side, side), _noise(1, 640, seed=1)
    tokens = x.contiguous(memory_format=torch.channels_last)
    scale = _noise(1, 8, 5, seed=2)
    fft, matrix = AdaFM(8, "fft"), AdaFM(8, "matrix")
    made = matrix.matrix(scale)
    yield _rows("AdaFM, channels first", lambda: fft(x, scale), lambda: matrix(x, scale), 3 * repeat)
    yield _rows("AdaFM, channels last, prepared", lambda: fft(x, scale), lambda: matrix(tokens, scale, made), 3 * repeat)
    for shifted in (False, True):
        block = AdaFMBlock(192, 6, 640, 128, shifted=shifted).eval()
        plain, name = plain_copy(block), "shifted" if shifted else "not shifted"
        ready = block.steer(temb)
        yield _rows(f"window attention, {name}", lambda: plain.attn(x), lambda: block.attn(tokens), repeat)
        yield _rows(f"block, {name}, prepared", lambda: plain(x, temb), lambda: block(tokens, ready), repeat)
    yield _rows("MLP", lambda: plain.mlp(x), lambda: block.mlp(tokens), repeat)
    norm = lambda v: F.group_norm(v, 32, block.norm1.weight, block.norm1.bias)
    yield _rows("group norm", lambda: norm(x), lambda: block.norm1(tokens), 3 * repeat)


@torch.no_grad()
def forward(quick):
    "The whole network, plain / fast, batch 1, latent 64 x 64; the first forward and T steps."
    from dit_sr_kit.presets import build

    name = "dit-sr-tiny" if quick else "dit-sr"
    torch.manual_seed(0)
    fast = build(name, device="cpu").eval()
    channels, steps = fast.config.in_channels, 2 if quick else 15
    x, cond = _noise(1, channels, 64, 64), _noise(1, 3, *[64 * fast.config.cond_size // fast.config.sample_size] * 2, seed=1)
    plain = plain_copy(fast)
    unprepared = copy.deepcopy(fast)
    fast.prepare(range(steps))
    repeat = 1 if quick else 3
    yield _rows(f"{name}, one step", lambda: plain(x, 1, cond), lambda: fast(x, 1, cond), repeat)
    yield _rows("  without / with prepare", lambda: unprepared(x, 1, cond), lambda: fast(x, 1, cond), repeat)

    def chain(model):
        "Each step sees the last result: differences add up."
        z = x
        for t in reversed(range(steps)): z = 0.5 * z + 0.5 * model(z, t, cond)
        return z

    yield _rows(f"{name}, a chain of {steps} steps", lambda: chain(plain), lambda: chain(fast), 1, warm=False)
    yield _half(fast, x, cond, repeat)
    if torch.cuda.is_available(): yield from _on_gpu(fast, plain, x, cond, quick)
    else: yield "on a GPU", "not measured", "this machine has none"


def _half(model, x, cond, repeat):
    "bfloat16 autocast on this processor, if it has the instructions."
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    native = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]

    def half():
        with torch.autocast("cpu", torch.bfloat16): return model(x, 1, cond).float()

    if native: return _rows(f"float32 / bfloat16 autocast ({native[0]})", lambda: model(x, 1, cond), half, repeat)
    want = model(x, 1, cond)
    difference = half() - want
    return ("bfloat16 autocast", "not timed", "this processor has neither avx512_bf16 nor amx; largest difference "
            f"{difference.abs().max():.1e}, its std {difference.std():.1e}, output std {want.std():.2g}")


def _on_gpu(fast, plain, x, cond, quick):
    "The same on a GPU: eager, bfloat16, and compiled; every call waits for the device."
    fast, plain, x, cond = fast.cuda(), plain.cuda(), x.cuda(), cond.cuda()
    fast.prepare(range(15))

    def run(model, half=False):
        def call():
            with torch.autocast("cuda", torch.bfloat16, enabled=half): out = model(x, 1, cond).float()
            torch.cuda.synchronize()
            return out
        return call

    repeat = 3 if quick else 31
    yield _rows("GPU, float32", run(plain), run(fast), repeat)
    yield _rows("GPU, plain float32 / bfloat16", run(plain), run(fast, True), repeat)
    fast.denoise = torch.compile(fast.denoise)
    yield _rows("GPU, the same, compiled", run(plain), run(fast, True), repeat)
