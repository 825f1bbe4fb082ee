"Spectra and coherence: units, rings, invariances, refusals."
import math

import numpy as np
import pytest
import torch

from dit_sr_kit import spectra
from dit_sr_kit.core import ConfigError, ImageError, make_generator


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=make_generator(seed), dtype=torch.float64)


def wave(cycles, size=128, phase=0.0):
    x = torch.arange(size, dtype=torch.float64)
    return 0.5 + 0.25 * torch.cos(2 * math.pi * cycles * x / size - phase).expand(1, 1, size, size)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_luma_ranges(data_range):
    white = data_range * torch.ones(2, 3, 4, 4)
    assert spectra.luma(white, data_range=data_range).shape == (2, 1, 4, 4)
    torch.testing.assert_close(spectra.luma(white, "full", data_range), white[:, :1])
    torch.testing.assert_close(spectra.luma(white, "limited", data_range), white[:, :1] * 235 / 255)
    black = spectra.luma(0 * white, "limited", data_range)
    torch.testing.assert_close(black, torch.full_like(black, data_range * 16 / 255))


def test_limited_luma_is_the_published_matrix():
    x = torch.rand(1, 3, 8, 8, generator=make_generator(1), dtype=torch.float64)
    published = (16 + 65.481 * x[:, 0] + 128.553 * x[:, 1] + 24.966 * x[:, 2]) / 255
    torch.testing.assert_close(spectra.luma(x, "limited")[:, 0], published)


@pytest.mark.parametrize("size", [(48, 48), (64, 96), (256, 256)])
def test_white_noise_has_the_density_of_its_variance(size):
    density = spectra.power_density(0.2 * noise(16, 1, *size))
    assert density.mean().item() == pytest.approx(0.04, rel=0.03)
    _, profile = spectra.radial_profile(0.2 * noise(16, 1, *size), bins=8)
    assert profile.mean(0)[1:].numpy() == pytest.approx(np.full(7, 0.04), rel=0.12)


def test_log_spectrum_is_centred():
    spectrum = spectra.log_power_spectrum(wave(32))
    assert spectrum.shape == (1, 128, 128)
    assert divmod(int(spectrum[0].argmax()), 128) in ((64, 64 - 32), (64, 64 + 32))
    assert torch.isfinite(spectra.log_power_spectrum(torch.zeros(1, 3, 16, 16))).all()


def test_a_grey_picture_and_its_plane_agree():
    plane = torch.rand(2, 1, 32, 32, generator=make_generator(2), dtype=torch.float64)
    rgb = plane.expand(-1, 3, -1, -1)
    torch.testing.assert_close(spectra.power_density(rgb), spectra.power_density(plane))
    torch.testing.assert_close(spectra.coherence(rgb, rgb.flip(-1)), spectra.coherence(plane, plane.flip(-1)))


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (7, 200)])
def test_rings_and_bands_agree(size):
    x = noise(3, 3, *size)
    bins = min(size) // 2
    frequency, profile = spectra.radial_profile(x, bins=bins)
    bands = [(i / (2 * bins), (i + 1) / (2 * bins)) for i in range(bins)]
    torch.testing.assert_close(profile, spectra.band_energy(x, bands))
    assert frequency[0] == pytest.approx(0.25 / bins) and frequency[-1] < 0.5


def test_the_corners_are_left_out():
    "A checkerboard lives at (0.5, 0.5), beyond every ring."
    i = torch.arange(64)
    board = ((i[:, None] + i) % 2).double().expand(1, 1, 64, 64)
    assert spectra.band_energy(board).max() < 1e-3 * spectra.power_density(board).max()


@pytest.mark.parametrize("degrees", [0, 30, 90, 150, 180])
def test_coherence_of_two_waves_is_the_cosine_of_their_phase(degrees):
    value = spectra.coherence(wave(20), wave(20, phase=math.radians(degrees))).item()
    assert value == pytest.approx(math.cos(math.radians(degrees)), abs=1e-3)


def test_coherence_ignores_brightness_and_contrast():
    a, b = noise(2, 3, 64, 64), noise(2, 3, 64, 64, seed=1)
    value = spectra.coherence(a, b)
    torch.testing.assert_close(spectra.coherence(0.1 * a + 0.4, 3 * b - 1), value)
    torch.testing.assert_close(spectra.coherence(b, a), value)
    torch.testing.assert_close(spectra.coherence(-a, b), -value)
    torch.testing.assert_close(spectra.coherence(a, a), torch.ones(2, dtype=torch.float64))
    assert value.abs().max() < 0.1


def test_coherence_is_the_correlation_of_band_passed_pictures():
    a = noise(1, 1, 64, 80)
    b = a + noise(1, 1, 64, 80, seed=1)
    window = np.outer(np.hanning(65)[:-1], np.hanning(81)[:-1])
    radius = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(80))
    filtered = []
    for x in (a, b):
        y = x[0, 0].numpy()
        spectrum = np.fft.fft2((y - y.mean()) * window) * ((radius >= 0.1) & (radius < 0.3))
        filtered.append(np.fft.ifft2(spectrum).real.ravel())
    expected = np.corrcoef(*filtered)[0, 1]
    assert spectra.coherence(a, b, (0.1, 0.3)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_flat_picture_shares_nothing(dtype):
    flat = torch.full((1, 3, 64, 64), 0.37, dtype=dtype)
    assert spectra.coherence(flat, noise(1, 3, 64, 64).to(dtype)).item() == 0
    assert spectra.coherence(flat, flat).item() == 0


def test_values_are_float64_whatever_comes_in():
    x = torch.rand(1, 3, 32, 32, generator=make_generator(3))
    for result in (spectra.coherence(x, x), spectra.band_energy(x), spectra.radial_profile(x)[1]):
        assert result.dtype == torch.float64
    assert spectra.luma(x).dtype == torch.float32


@pytest.mark.parametrize("call, error, words", [
    (lambda x: spectra.coherence(x, x[..., :16]), ImageError, "one shape"),
    (lambda x: spectra.coherence(x, x, (0.3, 0.2)), ConfigError, "0.3"),
    (lambda x: spectra.coherence(x, x, (0.2, 0.6)), ConfigError, "0.5"),
    (lambda x: spectra.coherence(x[..., :4, :4], x[..., :4, :4], (0.4, 0.45)), ImageError, "4 x 4"),
    (lambda x: spectra.radial_profile(x, bins=17), ConfigError, "16"),
    (lambda x: spectra.band_energy(x / 0), ImageError, "NaN"),
    (lambda x: spectra.band_energy(x[:, :2]), ImageError, "shape"),
    (lambda x: spectra.luma(x[:, :1]), ImageError, "RGB"),
    (lambda x: spectra.luma(x, "video"), ConfigError, "video"),
])
def test_refused(call, error, words):
    x = torch.rand(1, 3, 32, 32, generator=make_generator(4))
    with pytest.raises(error, match=words):
        call(x)
