"Colour fixes against SciPy, a triangle worked out by hand, and their definitions."
import numpy as np
import pytest
import scipy.ndimage
import torch

from dit_sr_kit.color import adain, match_color, wavelet_split
from dit_sr_kit.core import ConfigError, ImageError


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_low(x, levels=5):
    low = x.numpy()
    for level in range(levels):
        taps = np.zeros(2 * 2**level + 1)
        taps[[0, 2**level, -1]] = 0.25, 0.5, 0.25
        for axis in (2, 3):
            low = scipy.ndimage.convolve1d(low, taps, axis=axis, mode="nearest")
    return torch.from_numpy(low)


@pytest.mark.parametrize("height, width", [(70, 90), (9, 40), (1, 1), (1, 33)])
@pytest.mark.parametrize("levels", [0, 1, 5])
def test_the_split_is_scipys(height, width, levels):
    x = rand(2, 3, height, width)
    high, low = wavelet_split(x, levels)
    torch.testing.assert_close(low, scipy_low(x, levels), rtol=0, atol=1e-12)
    torch.testing.assert_close(high + low, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_the_cascade_is_a_triangle(levels):
    impulse = torch.zeros(1, 1, 129, 129, dtype=torch.float64)
    impulse[..., 64, 64] = 1
    n = 2**levels
    triangle = (n - (torch.arange(129) - 64).abs()).clamp(min=0).double() / n**2
    torch.testing.assert_close(wavelet_split(impulse, levels)[1][0, 0], torch.outer(triangle, triangle), rtol=0, atol=1e-15)


def test_adain_takes_mean_and_deviation_and_is_affine():
    image, reference = rand(2, 3, 20, 30), 0.3 + 0.2 * rand(2, 3, 20, 30, seed=1)
    out = adain(image, reference)
    torch.testing.assert_close(out.mean((2, 3)), reference.mean((2, 3)))
    torch.testing.assert_close(out.std((2, 3)), reference.std((2, 3)), rtol=5e-3, atol=0)
    for b in range(2):
        for c in range(3):
            slope, start = np.polyfit(image[b, c].flatten(), out[b, c].flatten(), 1)
            np.testing.assert_allclose(slope * image[b, c] + start, out[b, c], atol=1e-12)
            assert slope > 0


def test_a_picture_that_matches_is_left_alone():
    x = 0.2 + 0.6 * rand(1, 3, 40, 40)
    for method in ("wavelet", "adain"):
        torch.testing.assert_close(match_color(x, x, method), x)


def test_a_uniform_tint_is_removed_by_both():
    x = 0.2 + 0.5 * rand(1, 3, 64, 64)
    tinted = x + torch.tensor([0.1, 0.0, -0.1], dtype=x.dtype).view(1, 3, 1, 1)
    for method in ("wavelet", "adain"):
        torch.testing.assert_close(match_color(tinted, x, method), x, rtol=0, atol=1e-6)


def test_the_result_stays_in_range_and_keeps_dtype():
    x, reference = rand(1, 3, 40, 40).float(), torch.ones(1, 3, 40, 40)
    for method in ("wavelet", "adain"):
        out = match_color(x, reference, method)
        assert out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1
    flat = torch.full((1, 3, 8, 8), 0.5)
    assert torch.isfinite(match_color(flat, x[..., :8, :8], "adain")).all()


def test_errors_say_what_to_do():
    x = rand(1, 3, 16, 16)
    with pytest.raises(ImageError, match="Enlarge the LR image first"):
        match_color(x, rand(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="'wavelet' or 'adain'"):
        match_color(x, x, "histogram")
