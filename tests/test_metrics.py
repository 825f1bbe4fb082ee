"PSNR, SSIM, evaluation, the noise control and the adapter to pyiqa."
import json
import math
import warnings
from urllib.error import URLError

import pytest
import torch

from dit_sr_kit.core import ConfigError, ImageError, WeightsUnavailable, make_generator
from dit_sr_kit.degradations import bicubic_down
from dit_sr_kit.images import resize, sample_image
from dit_sr_kit.metrics import (Evaluation, MetricProtocol, _is_download_failure, comparison, evaluate,
                                noise_control, psnr, pyiqa_metric, ssim)
from dit_sr_kit.spectra import band_energy, coherence, luma

PROTOCOLS = [MetricProtocol(color, border) for color in ("rgb", "y_full", "y_limited") for border in (0, 5)]


@pytest.fixture(scope="module")
def pair():
    hr = torch.cat([sample_image(name)[..., :96, :128].double() for name in ("chelsea", "coffee")])
    return resize(bicubic_down(hr, 4), scale=4).clamp(0, 1), hr


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_psnr_and_ssim_against_scikit_image(pair, protocol):
    theirs = pytest.importorskip("skimage.metrics")
    for i, (ours_psnr, ours_ssim) in enumerate(zip(psnr(*pair, protocol), ssim(*pair, protocol))):
        a, b = (protocol.planes(x)[i].movedim(0, -1).numpy() for x in pair)
        assert ours_psnr.item() == pytest.approx(theirs.peak_signal_noise_ratio(b, a, data_range=1), abs=1e-9)
        expected = theirs.structural_similarity(b, a, data_range=1, channel_axis=-1, gaussian_weights=True,
                                                sigma=1.5, use_sample_covariance=False)
        assert ours_ssim.item() == pytest.approx(expected, abs=1e-9)


def test_known_values():
    hr = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64)
    assert psnr(hr + 0.1, hr, MetricProtocol("rgb")).item() == pytest.approx(20)
    assert psnr(hr + 0.1, hr, MetricProtocol("y_full")).item() == pytest.approx(20)
    assert psnr(hr + 0.1, hr).item() == pytest.approx(20 + 20 * math.log10(255 / 219))
    # flat pictures have no structure: the brightness term alone is left
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert ssim(hr + 0.1, hr, MetricProtocol("rgb")).item() == pytest.approx(expected)
    assert torch.isinf(psnr(hr, hr)).all() and ssim(hr, hr).item() == pytest.approx(1)


@pytest.mark.parametrize("color", ["rgb", "y_full", "y_limited"])
def test_units_do_not_matter(pair, color):
    levels = tuple(255 * x for x in pair)
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(*levels, MetricProtocol(color, data_range=255)),
                                   metric(*pair, MetricProtocol(color)))


def test_the_border_does_not_count(pair):
    sr, hr = (x.clone() for x in pair)
    sr[..., :4, :], sr[..., -4:, :], sr[..., :, :4], sr[..., :, -4:] = 0, 0, 0, 0
    protocol = MetricProtocol(crop_border=4)
    assert torch.equal(psnr(sr, hr, protocol), psnr(*pair, protocol))
    assert evaluate(sr, hr, protocol).scores == evaluate(*pair, protocol).scores
    assert (psnr(sr, hr) < psnr(*pair)).all()


def test_float32_is_measured_in_float64(pair):
    for metric in (psnr, ssim):
        result = metric(*(x.float() for x in pair))
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, metric(*pair), atol=1e-4, rtol=0)


def test_evaluation(pair):
    result = evaluate(*pair, names=["cat", "cup"])
    assert isinstance(result, Evaluation)
    assert result.psnr == pytest.approx(psnr(*pair).mean().item())
    assert result.ssim == pytest.approx(ssim(*pair).mean().item())
    assert result.coherence == pytest.approx(coherence(*pair).mean().item())
    text = repr(result)
    for part in (str(result.protocol), "limited", "cup", f"{result.psnr:.2f}"):
        assert part in text
    data = json.loads(json.dumps(result.to_dict()))
    assert data["protocol"] == dict(color="y_limited", crop_border=0, data_range=1.0)
    assert data["mean"]["psnr"] == result.psnr and data["names"] == ["cat", "cup"]


def test_comparison_refuses_to_mix(pair):
    a, b = evaluate(*pair), evaluate(pair[1], pair[1])
    table = comparison({"bicubic": a, "HR": b})
    assert "inf" in table and "bicubic" in table and str(a.protocol) in table
    one = [x[:1] for x in pair]
    for other in (evaluate(*pair, MetricProtocol("rgb")), evaluate(*pair, band=(0.25, 0.5)), evaluate(*one)):
        with pytest.raises(ConfigError, match="cannot compare bicubic, other"):
            comparison({"bicubic": a, "other": other})


def test_noise_control_has_the_power_and_not_the_detail(pair):
    sr, hr = pair
    control = noise_control(sr, hr, make_generator(0))
    top = [(0.25, 0.5)]
    torch.testing.assert_close(band_energy(control, top), band_energy(hr, top), rtol=0.06, atol=0)
    assert (coherence(control, hr) < coherence(sr, hr)).all()
    assert coherence(control - sr, hr, (0.25, 0.5)).abs().max() < 0.1
    noise = control - sr
    torch.testing.assert_close(noise[:, 0], noise[:, 2])  # grey
    assert torch.equal(control, noise_control(sr, hr, make_generator(0)))
    assert not torch.equal(control, noise_control(sr, hr, make_generator(1)))


def test_noise_control_of_something_smoother_is_bicubic(pair):
    sr, hr = pair
    assert torch.equal(noise_control(hr, sr, make_generator(0)), hr)


def test_noise_control_takes_given_noise(pair):
    sr, hr = (x.float() for x in pair)
    noise = torch.randn(2, 1, 96, 128, generator=make_generator(5))
    control = noise_control(sr, hr, noise=noise)
    assert control.dtype == torch.float32
    added = (control - sr)[:, 0] / noise[:, 0]
    assert (added.flatten(1).std(1) < 1e-3).all()
    with pytest.raises(ConfigError, match="noise"):
        noise_control(sr, hr, noise=noise[:1])


@pytest.mark.parametrize("call, error, words", [
    (lambda sr, hr: psnr(sr[..., :10], hr), ImageError, "one shape"),
    (lambda sr, hr: psnr(sr / 0, hr), ImageError, "NaN"),
    (lambda sr, hr: ssim(sr, hr * float("nan")), ImageError, "hr"),
    (lambda sr, hr: psnr(sr[:, :1], hr[:, :1]), ImageError, "shape"),
    (lambda sr, hr: psnr(255 * sr, 255 * hr), ImageError, "data_range"),
    (lambda sr, hr: psnr(sr, hr, MetricProtocol(data_range=255)), ImageError, "data_range"),
    (lambda sr, hr: psnr(sr, hr, MetricProtocol(crop_border=48)), ImageError, "48"),
    (lambda sr, hr: ssim(sr[..., :10, :], hr[..., :10, :]), ImageError, "11 x 11"),
    (lambda sr, hr: evaluate(sr, hr, names=["one"]), ConfigError, "names"),
    (lambda sr, hr: noise_control(sr[..., :32], hr), ImageError, "reference_sr"),
    (lambda sr, hr: MetricProtocol("y"), ConfigError, "'y'"),
    (lambda sr, hr: MetricProtocol(crop_border=-1), ConfigError, "-1"),
])
def test_refused(pair, call, error, words):
    with pytest.raises(error, match=words):
        call(*pair)


@pytest.fixture(scope="module")
def pyiqa():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("pyiqa")


def test_pyiqa_follows_these_protocols(pyiqa, pair):
    sr, hr = ((x * 255).round() / 255 for x in pair)
    for name, ours, color, tolerance in (("psnr", psnr, "rgb", 1e-3), ("psnry", psnr, "y_full", 1e-3),
                                         ("ssimc", ssim, "rgb", 1e-3), ("ssim", ssim, "y_full", 2e-3)):
        metric = pyiqa_metric(name)
        assert metric.needs_reference and not metric.lower_better and metric.name == name
        expected = ours(sr, hr, MetricProtocol(color))
        torch.testing.assert_close(metric(sr, hr).double(), expected, atol=tolerance, rtol=0)


def test_pyiqa_psnr_on_luma_is_not_limited_range(pyiqa, pair):
    difference = psnr(*pair) - pyiqa_metric("psnry")(*pair).double()
    offset = torch.full_like(difference, 20 * math.log10(255 / 219))
    torch.testing.assert_close(difference, offset, atol=1e-3, rtol=0)


class LocalEntryNotFoundError(FileNotFoundError):
    "Stands for huggingface_hub's error of this name."


def chained(cause):
    error = OSError("we could not connect")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("failure", [URLError("offline"), LocalEntryNotFoundError("not in the cache"),
                                     ConnectionResetError("gone"), TimeoutError("late"),
                                     chained(URLError("offline"))])
def test_a_failed_download_is_weights_unavailable(pyiqa, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure
    monkeypatch.setattr(pyiqa, "create_metric", fail)
    with pytest.raises(WeightsUnavailable, match="lpips") as caught:
        pyiqa_metric("lpips")
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize("failure", [KeyError("a bug"), FileNotFoundError("a file"),
                                     RuntimeError("shape mismatch"), ImportError("pkg_resources")])
def test_every_other_error_passes(pyiqa, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure
    monkeypatch.setattr(pyiqa, "create_metric", fail)
    with pytest.raises(type(failure)) as caught:
        pyiqa_metric("lpips")
    assert caught.value is failure and not _is_download_failure(failure)


def test_the_hub_errors_are_known_by_their_real_names():
    errors = pytest.importorskip("huggingface_hub.errors")
    for name in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "HfHubHTTPError"):
        kind = getattr(errors, name)
        assert _is_download_failure(kind.__new__(kind))


def test_pyiqa_metric_refuses(pyiqa, pair):
    with pytest.raises(ConfigError, match="Did you mean 'lpips'"):
        pyiqa_metric("lpisp")
    metric = pyiqa_metric("psnr")
    with pytest.raises(ConfigError, match="Pass hr"):
        metric(pair[0])
    with pytest.raises(ImageError, match="shape"):
        metric(pair[0], pair[1][..., :32])
    with pytest.raises(ImageError, match="NaN"):
        metric(pair[0] / 0, pair[1])


def test_luma_is_also_here():
    import dit_sr_kit.metrics as metrics
    assert metrics.luma is luma
