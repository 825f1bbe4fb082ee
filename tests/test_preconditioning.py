"Preconditioning against least squares on drawn numbers, EDM's formulas, the scheduler and the network."
import math

import pytest
import torch

from dit_sr_kit.core import ConfigError
from dit_sr_kit.images import resize
from dit_sr_kit.layers.preconditioning import ResidualPreconditioner, linear_coefficients
from dit_sr_kit.models.autoencoders import SpaceToDepth
from dit_sr_kit.models.dit_sr import DiTSR
from dit_sr_kit.schedulers import ResShiftScheduler

SQRT_ETAS = ResShiftScheduler().sqrt_etas


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kappa, residual_std", [(2.0, 0.14), (0.5, 0.3), (2.0, 0.02)])
def test_coefficients_are_least_squares(kappa, residual_std):
    w, c, input_std = linear_coefficients(SQRT_ETAS, kappa, residual_std)
    n = 100_000
    for t in (0, 1, 5, 14):
        eta = SQRT_ETAS[t] ** 2
        e0, noise = residual_std * randn(n, seed=1), randn(n, seed=2)
        d = -(1 - eta) * e0 + kappa * eta.sqrt() * noise
        slope = (e0 * d).sum() / d.square().sum()
        assert abs(slope - w[t]) < 5 * c[t] / input_std[t] / n**0.5
        assert abs((e0 - w[t] * d).std() / c[t] - 1) < 5 / (2 * n) ** 0.5
        assert abs(d.std() / input_std[t] - 1) < 5 / (2 * n) ** 0.5


def test_coefficients_are_those_of_edm_for_the_residual():
    s_r, kappa = 0.14, 2.0
    w, c, input_std = linear_coefficients(SQRT_ETAS, kappa, s_r)
    shrink = 1 - SQRT_ETAS**2
    sigma = kappa * SQRT_ETAS / shrink
    torch.testing.assert_close(-shrink * w, s_r**2 / (sigma**2 + s_r**2))
    torch.testing.assert_close(c, sigma * s_r / (sigma**2 + s_r**2).sqrt())
    torch.testing.assert_close(shrink / input_std, (sigma**2 + s_r**2) ** -0.5)
    assert (c.diff() > 0).all() and (c < s_r).all() and (c < sigma).all()


def batch(seed=0):
    lr = randn(2, 3, 8, 8, seed=seed)
    z0 = randn(2, 48, 8, 8, seed=seed + 1)
    zy = SpaceToDepth(4).encode(resize(lr, scale=4))
    return lr, z0, zy


def test_it_speaks_the_language_of_the_scheduler_and_the_autoencoder():
    scheduler, pre = ResShiftScheduler(), ResidualPreconditioner(SQRT_ETAS, 2.0, 0.14)
    lr, z0, zy = batch()
    torch.testing.assert_close(pre.lr_latent(lr), zy, rtol=0, atol=0)
    times = torch.tensor([0, 14])
    x_t = scheduler.add_noise(z0, randn(2, 48, 8, 8, seed=9), times, zy)
    sample = scheduler.scale_model_input(x_t, times)
    std = pre.tables["input_std"][times].view(-1, 1, 1, 1)
    torch.testing.assert_close(pre.network_input(sample, times, lr) * std, x_t - zy)
    weight = pre.tables["w"][times].view(-1, 1, 1, 1)
    torch.testing.assert_close(pre.linear_estimate(sample, times, lr), zy - weight * (x_t - zy))
    target = (z0 - pre.linear_estimate(sample, times, lr)) / pre.tables["c"][times].view(-1, 1, 1, 1)
    torch.testing.assert_close(pre.combine(target, sample, times, lr), z0)


def test_one_timestep_stands_for_the_batch():
    pre = ResidualPreconditioner(SQRT_ETAS)
    lr, z0, _ = batch()
    for one in (7, torch.tensor(7), torch.tensor([7])):
        got = pre.combine(z0, z0, one, lr)
        torch.testing.assert_close(got, pre.combine(z0, z0, torch.tensor([7, 7]), lr), rtol=0, atol=0)


def test_the_target_has_unit_variance_and_zero_output_the_linear_error():
    s_r, scheduler = 0.14, ResShiftScheduler()
    pre = ResidualPreconditioner(SQRT_ETAS, 2.0, s_r)
    lr = randn(4, 3, 16, 16, seed=3)
    zy = pre.lr_latent(lr)
    z0 = zy - s_r * randn(*zy.shape, seed=4)
    for t in range(15):
        sample = scheduler.scale_model_input(scheduler.add_noise(z0, randn(*zy.shape, seed=5 + t), t, zy), t)
        error = z0 - pre.combine(torch.zeros_like(z0), sample, t, lr)
        assert abs(error.std() / pre.tables["c"][t] - 1) < 0.02
        assert abs(pre.network_input(sample, t, lr).std() - 1) < 0.02


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precision_follows(dtype, tolerance):
    pre = ResidualPreconditioner(SQRT_ETAS).to(dtype)
    assert all(table.dtype == torch.float64 for table in pre.tables.values())
    lr, z0, _ = batch()
    want = pre.combine(z0, z0, 3, lr)
    got = pre.combine(z0.to(dtype), z0.to(dtype), 3, lr.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_gradients_reach_the_network_scaled_by_c():
    pre = ResidualPreconditioner(SQRT_ETAS)
    lr, z0, _ = batch()
    output = torch.zeros_like(z0).requires_grad_()
    pre.combine(output, z0, torch.tensor([0, 14]), lr).sum().backward()
    for i, t in enumerate((0, 14)):
        torch.testing.assert_close(output.grad[i], torch.full_like(z0[i], pre.tables["c"][t].item()))


def test_tables_follow_from_the_configuration_alone():
    assert not ResidualPreconditioner(SQRT_ETAS).state_dict()
    with torch.device("meta"):
        ghost = ResidualPreconditioner(SQRT_ETAS.tolist())
    assert all(table.device.type == "cpu" for table in ghost.tables.values())


def test_a_network_that_returns_zero_is_the_linear_estimate():
    network = DiTSR(sample_size=8, in_channels=48, out_channels=48, cond_size=8, base_channels=32, channel_mult=(1,),
                    attention_resolutions=(8,), depth=1, hidden_size=32, attention_head_dim=16, window_size=8,
                    preconditioning=dict(sqrt_etas=SQRT_ETAS.tolist(), residual_std=0.14)).double().eval()
    with torch.no_grad():
        network.conv_out.weight.zero_()
        network.conv_out.bias.zero_()
        lr, z0, _ = batch()
        times = torch.tensor([2, 11])
        want = network.preconditioner.linear_estimate(z0, times, lr)
        torch.testing.assert_close(network(z0, times, lr), want)


@pytest.mark.parametrize("bad", [dict(residual_std=0.0), dict(residual_std=-1.0), dict(residual_std=math.nan),
                                 dict(kappa=0.0), dict(sqrt_etas=[0.0, 0.5]), dict(sqrt_etas=[0.5, 1.98]),
                                 dict(sqrt_etas=[0.5, math.nan])])
def test_impossible_numbers_are_refused(bad):
    with pytest.raises(ConfigError):
        ResidualPreconditioner(**{"sqrt_etas": SQRT_ETAS, **bad})
