"The five questions: arithmetic of honest samples, spread and centre, the last step, and the report as a whole."
import math

import numpy as np
import pytest
import torch

from dit_sr_kit.core import ConfigError, make_generator
from dit_sr_kit.degradations import bicubic_down
from dit_sr_kit.evaluation import RestorationReport, last_step_error, restoration_report, spread_and_centre
from dit_sr_kit.images import resize, sample_image, sample_names
from dit_sr_kit.layers.preconditioning import ResidualPreconditioner
from dit_sr_kit.metrics import MetricProtocol, psnr
from dit_sr_kit.models.autoencoders import SpaceToDepth
from dit_sr_kit.pipelines import SRPipeline
from dit_sr_kit.schedulers import ResShiftScheduler


class Linear(torch.nn.Module):
    "No network at all: the best linear estimate for residuals of deviation 0.1."
    size_multiple, dtype = 16, torch.float32

    def __init__(self):
        super().__init__()
        self.preconditioner = ResidualPreconditioner(ResShiftScheduler().sqrt_etas, 2.0, 0.1)

    def forward(self, sample, timestep, cond):
        return self.preconditioner.linear_estimate(sample, timestep, cond)


@pytest.fixture(scope="module")
def pipe():
    return SRPipeline(Linear(), ResShiftScheduler(), SpaceToDepth(4), 4, "linear")


@pytest.fixture(scope="module")
def photographs():
    return {name: sample_image(name)[..., 100:164, 120:184] for name in sample_names()[:2]}


@pytest.fixture(scope="module")
def report(pipe, photographs):
    return restoration_report(pipe, photographs, num_samples=3, progress=False)


def test_rows(report, photographs):
    assert list(report.rows) == ["HR", "bicubic", "first estimate", "one sample", "mean of 3", "control of one sample"]
    assert list(report.per_photograph) == list(photographs) and report.num_photographs == 2 and report.num_samples == 3
    for method, row in report.rows.items():
        for key, value in row.items():
            mean = sum(rows[method][key] for rows in report.per_photograph.values()) / 2
            assert value == mean or abs(value - mean) < 1e-12
    assert report.rows["HR"]["psnr"] == math.inf and abs(report.rows["HR"]["coherence"] - 1) < 1e-9
    name, hr = next(iter(photographs.items()))
    bicubic = resize(bicubic_down(hr).clamp(0, 1), scale=4).clamp(0, 1)
    assert report.per_photograph[name]["bicubic"]["psnr"] == psnr(bicubic, hr).item()


def test_a_sampler_without_a_network(report):
    "Grain without structure: worse than the first estimate, which is bicubic; the mean is better than one sample."
    rows = report.rows
    assert abs(rows["first estimate"]["psnr"] - rows["bicubic"]["psnr"]) < 0.1
    assert rows["one sample"]["psnr"] < rows["mean of 3"]["psnr"] < rows["first estimate"]["psnr"]
    assert abs(rows["control of one sample"]["top_octave"] - rows["one sample"]["top_octave"]) < 0.1
    assert abs(rows["control of one sample"]["coherence"] - rows["one sample"]["coherence"]) < 0.1  # no more than noise


def test_expected_numbers(report):
    first = report.rows["first estimate"]["psnr"]
    assert abs(first - report.expected_psnr() - 3.0103) < 1e-4 and abs(first - report.expected_psnr(4) - 0.9691) < 1e-4
    squares = [rows["first estimate"]["coherence"] ** 2 for rows in report.per_photograph.values()]
    assert abs(report.expected_coherence() - sum(squares) / 2) < 1e-12
    made_up = RestorationReport("", MetricProtocol(), 1, 1, per_photograph={"a": {"first estimate": {"coherence": 0.8}}})
    assert abs(made_up.expected_coherence(1) - 0.64) < 1e-12
    assert abs(made_up.expected_coherence(10**9) - 0.8) < 1e-6 and made_up.expected_coherence(2) < made_up.expected_coherence(3)
    made_up.per_photograph["a"]["first estimate"]["coherence"] = 0.0
    assert made_up.expected_coherence() == 0


def test_text(report):
    text = str(report)
    assert "linear: 2 photographs, 3 samples each" in text and "luma, limited range" in text
    for wanted in ("honest: one sample", "honest: mean of 3", "spread of the samples", "t = 0", "control of one sample"):
        assert wanted in text, wanted
    assert "inf" not in text and "nan" not in text


def test_seeds(pipe, photographs, report):
    before = torch.random.get_rng_state()
    again = restoration_report(pipe, photographs, num_samples=3, progress=False)
    assert again.rows == report.rows and again.last_step == report.last_step
    assert torch.equal(before, torch.random.get_rng_state())
    other = restoration_report(pipe, photographs, num_samples=3, seed=1, progress=False)
    assert other.rows["one sample"] != report.rows["one sample"] and other.rows["bicubic"] == report.rows["bicubic"]


def test_settings(pipe, photographs):
    hr = dict(list(photographs.items())[:1])
    short = restoration_report(pipe, hr, 1, num_inference_steps=2, protocol=MetricProtocol("rgb", 4), progress=False)
    assert "RGB; border of 4 px" in str(short) and "mean of 1" in short.rows and "spread" not in str(short)
    assert short.rows["one sample"] == short.rows["mean of 1"]
    low = restoration_report(pipe, hr, 1, num_inference_steps=2, band=(0.0625, 0.125), progress=False)
    assert low.rows["bicubic"]["coherence"] > short.rows["bicubic"]["coherence"]


def test_a_picture_smaller_than_the_network(pipe):
    "Restored with padding; the last step is not asked, and the text says nothing about it."
    report = restoration_report(pipe, {"small": sample_image("chelsea")[..., 100:132, 100:140]}, 2, 2, progress=False)
    assert report.last_step == {} and "t = 0" not in str(report) and math.isfinite(report.rows["one sample"]["psnr"])


def test_spread_and_centre():
    "Exact for any images, because it is an identity."
    g = make_generator(0)
    truth, centre = torch.randn(2, 1000, generator=g, dtype=torch.float64)
    samples = centre + 0.5 * torch.randn(4, 1000, generator=g, dtype=torch.float64)
    decibels = lambda mse: {"psnr": -10 * math.log10(mse)}
    rows = {"first estimate": decibels(0.25), "one sample": decibels((samples - truth).square().mean().item()),
            "mean of 4": decibels((samples.mean(0) - truth).square().mean().item())}
    variance = samples.var(0).mean().item()
    spread, psnr_of_centre = spread_and_centre(rows)
    assert abs(spread - (variance / 0.25) ** 0.5) < 1e-9
    assert abs(psnr_of_centre - decibels((samples.mean(0) - truth).square().mean().item() - variance / 4)["psnr"]) < 1e-9
    honest = {"first estimate": {"psnr": 30.0}, "one sample": {"psnr": 30 - 10 * math.log10(2)},
              "mean of 8": {"psnr": 30 - 10 * math.log10(1.125)}}
    assert np.allclose(spread_and_centre(honest), (1.0, 30.0))
    frozen = {method: {"psnr": 28.0} for method in honest}
    assert np.allclose(spread_and_centre(frozen), (0.0, 28.0))  # a sampler that always says the same
    for rows in (dict(honest, **{"mean of 1": {"psnr": 27.0}}), {"first estimate": {"psnr": 30.0}, "one sample": {"psnr": 27.0}}):
        rows.pop("mean of 8", None)
        with pytest.raises(ConfigError, match="at least 2"): spread_and_centre(rows)


def test_last_step(pipe, photographs):
    hr = torch.cat(list(photographs.values()))
    network, linear = last_step_error(pipe, hr, make_generator(4))
    lr = bicubic_down(hr).clamp(0, 1)
    x0, y = (SpaceToDepth(4).encode(2 * v - 1) for v in (hr, resize(lr, scale=4)))
    noise = torch.randn(x0.shape, generator=make_generator(4))
    x_t = ResShiftScheduler().add_noise(x0, noise, 0, y)
    a, b = (v.flatten().double().numpy() for v in (x_t - y, x0 - y))
    weight, squares, *_ = np.linalg.lstsq(a[:, None], b, rcond=None)
    assert abs(linear / (squares[0] / b.size) - 1) < 1e-4
    by_hand = y - pipe.model.preconditioner.tables["w"][0].float() * (x_t - y)
    assert abs(network / (by_hand - x0).square().mean().item() - 1) < 1e-4
    assert linear <= network and 0 < weight[0] < 1  # nothing linear beats the fitted line


def test_impossible_requests(pipe, photographs):
    with pytest.raises(ConfigError, match="num_samples is 0"): restoration_report(pipe, photographs, num_samples=0)
    with pytest.raises(ConfigError, match="no photographs"): restoration_report(pipe, {})


def test_progress_goes_to_standard_error(pipe, photographs, capfd):
    restoration_report(pipe, photographs, 1, 1, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "linear" in err
