"Bicubic reduction against PyTorch, Pillow and loops written from MATLAB's definition."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dit_sr_kit.core import ConfigError, ImageError
from dit_sr_kit.degradations import KERNELS, bicubic_down, cubic, degrade, resize_matrix
from dit_sr_kit.images import load_image, sample_image, to_pil


def loops(row, scale, a=-0.5):
    "imresize of one row, one-based like its documentation; slow and independent of the package."
    def kernel(d):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0
    n = len(row)
    mirror = list(range(1, n + 1)) + list(range(n, 0, -1))
    out = []
    for i in range(1, n // scale + 1):
        u = i * scale + 0.5 * (1 - scale)
        left = int(np.floor(u - 2 * scale))
        taps = range(left, left + 4 * scale + 2)
        weights = [kernel((u - j) / scale) / scale for j in taps]
        out.append(sum(w * row[mirror[(j - 1) % (2 * n)] - 1] for w, j in zip(weights, taps)) / sum(weights))
    return out


@pytest.mark.parametrize("n, scale", [(64, 4), (32, 2), (12, 3), (8, 4), (4, 4), (16, 8), (10, 1)])
def test_matlab_matrix_is_the_loops(n, scale):
    row = np.random.default_rng(n).random(n)
    ours = resize_matrix(n, n // scale, "matlab").numpy() @ row
    np.testing.assert_allclose(ours, loops(row, scale), atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (2, 3, 4, 8), (1, 3, 8, 16)])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_pil_kernel_is_torch_antialias(shape, scale):
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size = [n // scale for n in shape[2:]]
    wanted = F.interpolate(x, size=size, mode="bicubic", antialias=True)
    torch.testing.assert_close(bicubic_down(x, scale), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("height, width", [(64, 4), (4, 64), (4, 4), (8, 8)])
def test_tiny_pictures_are_pillows(height, width):
    "PyTorch 2.15 is wrong on the CPU for a result one pixel wide, so Pillow is the reference here."
    x = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    pillow = np.stack([np.array(Image.fromarray(c).resize((width // 4, height // 4), Image.BICUBIC)) for c in x.numpy()])
    np.testing.assert_allclose(bicubic_down(x[None].double())[0].numpy(), pillow, atol=1e-6)


def test_pil_kernel_is_pillow():
    x = sample_image("chelsea")[..., :96, :128]
    ours = bicubic_down(x.double())[0]
    pillow = np.stack([np.array(Image.fromarray(c).resize((32, 24), Image.BICUBIC)) for c in x[0].numpy()])
    np.testing.assert_allclose(ours.numpy(), pillow, atol=1e-6)
    on_8_bits = load_image(to_pil(x)[0].resize((32, 24), Image.BICUBIC))
    assert ((ours.clamp(0, 1) * 255).round() - (on_8_bits[0] * 255).round()).abs().max() <= 1


def test_the_two_kernels_differ_in_two_pixels_at_the_border_only():
    x = sample_image("coffee").double()
    difference = (bicubic_down(x) - bicubic_down(x, kernel="matlab")).abs()
    assert difference[..., 2:-2, 2:-2].max() < 1e-14 and difference.max() > 1e-3


@pytest.mark.parametrize("kernel", KERNELS)
def test_flat_stays_flat_and_a_ramp_stays_a_ramp(kernel):
    flat = torch.full((1, 3, 32, 32), 0.37, dtype=torch.float64)
    torch.testing.assert_close(bicubic_down(flat, kernel=kernel), flat[..., :8, :8])
    ramp = torch.arange(32, dtype=torch.float64).expand(1, 3, 32, 32)
    inner = bicubic_down(ramp, kernel=kernel)[0, 0, 4, 2:-2]
    torch.testing.assert_close(inner, torch.arange(2, 6, dtype=torch.float64) * 4 + 1.5)
    assert torch.allclose(resize_matrix(32, 8, kernel).sum(1), torch.ones(8, dtype=torch.float64))


def test_the_kernel():
    d = torch.tensor([0, 1, 2, 3, -1, 0.5, 1.5], dtype=torch.float64)
    torch.testing.assert_close(cubic(d), torch.tensor([1, 0, 0, 0, 0, 0.5625, -0.0625], dtype=torch.float64))
    torch.testing.assert_close(cubic(d, -0.75)[5:], torch.tensor([0.59375, -0.09375], dtype=torch.float64))


def test_dtype_and_gradient():
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    y = bicubic_down(x)
    y.sum().backward()
    assert y.dtype == torch.float32 and abs(x.grad.sum() - 3 * 16) < 1e-4
    assert bicubic_down(x.detach().double()).dtype == torch.float64
    assert bicubic_down(x.detach().bfloat16()).dtype == torch.bfloat16


def test_errors():
    x = torch.rand(1, 3, 30, 32)
    with pytest.raises(ImageError, match=r"crop_to\(hr, 28, 32\)"):
        bicubic_down(x)
    x = x[..., :28, :]
    for wrong in [dict(kernel="mat"), dict(scale=0), dict(scale=2.5), dict(scale=-4)]:
        with pytest.raises(ConfigError):
            bicubic_down(x, **wrong)
    for wrong in [x[0], x[:, :1], x.byte(), x * float("nan"), "x"]:
        with pytest.raises(ImageError):
            bicubic_down(wrong)
    with pytest.raises(ConfigError):
        resize_matrix(4, 8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_degrade_makes_an_8_bit_file_and_a_record(kernel):
    hr = sample_image("chelsea")[..., :64, :64]
    lr, record = degrade(hr, kernel=kernel)
    assert lr.shape == (1, 3, 16, 16) and 0 <= lr.min() and lr.max() <= 1
    assert torch.equal(load_image(to_pil(lr)[0]), lr)
    torch.testing.assert_close(lr, bicubic_down(hr, kernel=kernel).clamp(0, 1), rtol=0, atol=0.5 / 255 + 1e-6)
    assert json.loads(json.dumps(record)) == record and record["kernel"] == kernel and record["scale"] == 4


def test_degrade_noise_is_reproducible_and_as_strong_as_recorded():
    hr = torch.full((3, 3, 256, 256), 0.5)
    a, first = degrade(hr, noise_std=(0.02, 0.1), generator=torch.Generator().manual_seed(0))
    b, second = degrade(hr, noise_std=(0.02, 0.1), generator=torch.Generator().manual_seed(0))
    c, third = degrade(hr, noise_std=(0.02, 0.1), generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b) and first == second and third != first
    for x, std in zip(a, first["noise_std"]):
        assert 0.02 <= std <= 0.1 and abs((x - 0.5).std() / std - 1) < 0.05
    for wrong in [(0.1, 0.0), (-0.1, 0.1)]:
        with pytest.raises(ConfigError):
            degrade(hr, noise_std=wrong)


def test_plain_degrade_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    degrade(torch.rand(1, 3, 8, 8), generator=generator)
    assert torch.equal(before, generator.get_state())
