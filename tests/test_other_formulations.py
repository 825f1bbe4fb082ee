"Cold diffusion and rectified flow: when a step is exact, and what a perfect network makes of them."
import pytest
import torch

from dit_sr_kit.core import ConfigError
from dit_sr_kit.schedulers.common import SchedulerStep
from dit_sr_kit.schedulers.other_formulations import (blend_degradation, cold_diffusion_sample, cold_diffusion_step, flow_sample,
                                                      gaussian_velocity_gain, path_velocity, straight_path)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*(shape or (2, 3, 8, 8)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blur(x):
    return (x + x.roll(1, -1) + x.roll(-1, -1)) / 3


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_improved_step_does_not_need_a_good_network_where_one_direction_serves_all(steps):
    x0, e = draw(0), draw(1)
    degrade = lambda x, t: x + t * e
    out = cold_diffusion_sample(degrade(x0, steps), lambda x, t: draw(t), degrade, steps)
    torch.testing.assert_close(out, x0, atol=1e-12, rtol=0)
    assert (cold_diffusion_sample(degrade(x0, steps), lambda x, t: draw(t), degrade, steps, improved=False) - x0).abs().max() > 0.5


def test_what_is_left_of_the_mistakes_of_a_network():
    x0, mistakes, steps = draw(0), [draw(i + 5) for i in range(6)], 6
    degrade = blend_degradation(blur, steps)
    torch.testing.assert_close(degrade(x0, 0), x0)
    torch.testing.assert_close(degrade(x0, steps), blur(x0))
    out = cold_diffusion_sample(degrade(x0, steps), lambda x, t: x0 + mistakes[t - 1], degrade, steps)
    mean = sum(mistakes) / steps
    torch.testing.assert_close(out - x0, mean - blur(mean), atol=1e-12, rtol=0)


def test_a_perfect_network_is_followed_exactly_by_both_steps():
    x0 = draw(0)
    degrade = blend_degradation(blur, 4)
    for improved in (True, False):
        out = cold_diffusion_sample(degrade(x0, 4), lambda x, t: x0, degrade, 4, improved)
        torch.testing.assert_close(out, x0, atol=1e-12, rtol=0)


def test_a_step_returns_the_clean_estimate_and_keeps_the_dtype():
    x, pred = draw(0, dtype=torch.float32), draw(1, dtype=torch.float32)
    step = cold_diffusion_step(x, pred, blend_degradation(blur, 3), 3, 2)
    assert isinstance(step, SchedulerStep) and step.pred_original_sample is pred and step.prev_sample.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_is_exact_on_straight_paths(steps):
    a, b = draw(0), draw(1)
    torch.testing.assert_close(flow_sample(a, lambda x, t: path_velocity(a, b), steps), b, atol=1e-12, rtol=0)
    torch.testing.assert_close(straight_path(a, b, 0.0), a)
    torch.testing.assert_close(straight_path(a, b, torch.tensor([0.0, 1.0])), torch.stack([a[0], b[1]]))


def test_the_exact_velocity_is_the_least_squares_one():
    mix = torch.tensor([[1.0, 0.0], [0.6, 0.7]], dtype=torch.float64)
    a, b = mix @ draw(0, 2, 200_000)
    for time in (0.0, 0.3, 0.8, 1.0):
        x = (1 - time) * a + time * b
        fitted = (x * (b - a)).mean() / x.square().mean()
        exact = gaussian_velocity_gain(time, torch.tensor(1.0), torch.tensor(0.36 + 0.49), torch.tensor(0.6))
        assert fitted == pytest.approx(float(exact), abs=0.01)


def test_many_steps_keep_the_collection_and_one_step_regresses():
    var_a, var_b, cov = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 2.0, 0.4))
    gain = lambda n: flow_sample(torch.ones((), dtype=torch.float64), lambda x, t: gaussian_velocity_gain(t, var_a, var_b, cov) * x, n)
    assert float(gain(1)) == pytest.approx(float(cov / var_a))
    errors = [abs(float(gain(n) ** 2 * var_a - var_b)) for n in (50, 100, 200)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # Euler is of first order


def test_rectifying_once_more_makes_one_step_enough():
    var_a, var_b, cov = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 2.0, 0.4))
    one = torch.ones((), dtype=torch.float64)
    gain = flow_sample(one, lambda x, t: gaussian_velocity_gain(t, var_a, var_b, cov) * x, 64)
    straight = lambda x, t: gaussian_velocity_gain(t, var_a, gain**2 * var_a, gain * var_a) * x
    for n in (1, 5):
        torch.testing.assert_close(flow_sample(one, straight, n), gain)


def test_seeing_the_lr_picture_turns_both_methods_into_regression():
    y, answer = draw(0), 0.3 * draw(0)
    for n in (1, 4):
        blend = lambda x, t: x + t / n * (y - x)
        torch.testing.assert_close(cold_diffusion_sample(y, lambda x, t: answer, blend, n), answer)
        torch.testing.assert_close(flow_sample(y, lambda x, t: answer - y, n), answer)


@pytest.mark.parametrize("call, message", [
    (lambda: cold_diffusion_step(draw(0), draw(1), blend_degradation(blur, 3), 2, 2), "smaller one"),
    (lambda: cold_diffusion_step(draw(0), draw(1), blend_degradation(blur, 3), 2, -1), "not negative"),
    (lambda: cold_diffusion_step(draw(0), draw(1)[:1], blend_degradation(blur, 3), 2, 1), "must agree"),
    (lambda: flow_sample(draw(0), lambda x, t: x, 0), "at least 1"),
    (lambda: straight_path(draw(0), draw(1)[..., :4], 0.5), "must agree"),
    (lambda: path_velocity(draw(0), draw(1)[..., :4]), "must agree"),
    (lambda: straight_path(draw(0), draw(1), torch.zeros(3)), "one per sample"),
])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
