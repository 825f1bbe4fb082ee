"Conversions of predictions: ends, guards, round trips, losses and the map between the conventions."
import itertools
import math

import pytest
import torch

from dit_sr_kit.core import ConfigError
from dit_sr_kit.schedulers import FlowMatchScheduler, JiTFlowScheduler, convert_prediction
from dit_sr_kit.schedulers.flow import flow_to_vp
from dit_sr_kit.schedulers.parametrisations import error_factor, velocity_to_flow, velocity_to_vp, vp_to_flow

KINDS = dict(vp=("sample", "epsilon", "v_prediction"), flow=("sample", "noise", "flow"))
DIVISORS = {("sample", "epsilon"): "sigma", ("sample", "v_prediction"): "sigma", ("epsilon", "sample"): "alpha",
            ("epsilon", "v_prediction"): "alpha", ("sample", "noise"): "sigma", ("sample", "flow"): "sigma",
            ("noise", "sample"): "alpha", ("noise", "flow"): "alpha"}
PAIRS = [(how, src, dst) for how in KINDS for src, dst in itertools.permutations(KINDS[how], 2)]


def world(convention, t, k=1.0, dtype=torch.float64):
    "True answers, state and weights at one time."
    g = torch.Generator().manual_seed(0)
    x, e = (torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    if convention == "vp":
        a, s, _ = flow_to_vp(t, k)
        true, state = dict(sample=x, epsilon=e, v_prediction=a * e - s * x), a * x + s * e
    else:
        a, s, n = t, 1 - t, k * e
        true, state = dict(sample=x, noise=n, flow=x - n), t * x + (1 - t) * n
    return {key: value.to(dtype) for key, value in true.items()}, state.to(dtype), a, s


@pytest.mark.parametrize("how,src,dst", PAIRS)
def test_round_trips(how, src, dst):
    for t, k in itertools.product((0.01, 0.05, 0.3, 0.5, 0.8, 0.99), (0.5, 1.0, 2.0)):
        true, state, a, s = world(how, t, k)
        there = convert_prediction(true[src], src, dst, state, a, s, how)
        assert (there - true[dst]).abs().max() < 1e-12
        assert (convert_prediction(there, dst, src, state, a, s, how) - true[src]).abs().max() < 1e-12


@pytest.mark.parametrize("how,src,dst", PAIRS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends(how, src, dst, t):
    "Where nothing divides by zero the answer is exact; elsewhere there is an error, or zero behind a guard."
    true, state, a, s = world(how, t, 2.0)
    call = lambda a, s, **more: convert_prediction(true[src], src, dst, state, a, s, how, **more)
    if DIVISORS.get((src, dst)) == ("alpha" if t == 0 else "sigma"):
        with pytest.raises(ConfigError, match="floor=0.05"): call(a, s)
        with pytest.raises(ConfigError, match="does not determine"): call(torch.full((2,), a), torch.full((2,), s))
        for weights in ((a, s), (torch.full((2,), a), torch.full((2,), s))): assert not call(*weights, floor=0.05).any()
    else:
        assert torch.equal(call(a, s, floor=0.05), call(a, s))
        assert torch.allclose(call(a, s), true[dst], atol=1e-14)
    assert convert_prediction(true[src], src, src, state, a, s, how) is true[src]  # nothing to do, at the ends either


@pytest.mark.parametrize("how,src,dst", PAIRS)
@pytest.mark.parametrize("t", [0.001, 0.04, 0.3, 0.97, 0.999])
def test_the_guard_scales_the_answer(how, src, dst, t):
    true, state, a, s = world(how, t)
    free = convert_prediction(true[src], src, dst, state, a, s, how)
    q = dict(alpha=a, sigma=s).get(DIVISORS.get((src, dst)), 1.0)
    for f in (0.05, 0.4):
        expected = free * min(1.0, q / f)
        batch = [torch.full((2,), w, dtype=torch.float64) for w in (a, s)]
        for weights in ((a, s), batch): assert torch.allclose(convert_prediction(true[src], src, dst, state, *weights, how, floor=f), expected, atol=1e-12)
    single, low = true[src].float(), state.float()
    assert convert_prediction(single, src, dst, low, a, s, how, floor=0.05).dtype == torch.float32


@pytest.mark.parametrize("floor", [-0.1, float("nan")])
def test_a_guard_is_not_negative(floor):
    true, state, a, s = world("flow", 0.3)
    with pytest.raises(ConfigError, match="floor="): convert_prediction(true["sample"], "sample", "flow", state, a, s, "flow", floor=floor)


@pytest.mark.parametrize("t", [0.1, 0.94, 0.96, 0.999, 1.0])
def test_the_guard_is_that_of_jit(t):
    true, state, a, s = world("flow", t)
    scheduler = JiTFlowScheduler()
    assert torch.allclose(convert_prediction(true["sample"], "sample", "flow", state, a, s, "flow", floor=0.05),
                          scheduler.velocity(true["sample"], t, state), atol=1e-13)


@pytest.mark.parametrize("how,src,dst", PAIRS)
def test_losses_are_weighted_losses(how, src, dst):
    for t in (0.02, 0.4, 0.9):
        true, state, a, s = world(how, t)
        wrong = torch.randn(state.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        factor = error_factor(src, dst, *(torch.tensor([w], dtype=torch.float64) for w in (a, s)), how)
        moved = convert_prediction(true[src] + wrong, src, dst, state, a, s, how) - convert_prediction(true[src], src, dst, state, a, s, how)
        assert torch.allclose(moved, factor * wrong, atol=1e-10)
        closed = {("sample", "v_prediction"): 1 / s, ("epsilon", "v_prediction"): 1 / a, ("sample", "epsilon"): a / s, ("sample", "flow"): 1 / s,
                  ("noise", "flow"): 1 / a, ("sample", "noise"): a / s}
        if (src, dst) in closed: assert abs(factor.item()) == pytest.approx(closed[src, dst])
        if (dst, src) in closed: assert abs(factor.item()) == pytest.approx(1 / closed[dst, src])


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0])
def test_between_the_conventions(k):
    t = torch.tensor([0.0, 1e-3, 0.3, 0.7, 1.0], dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    x, e = (torch.randn(5, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    a, s, R = flow_to_vp(t, k)
    wide = lambda w: w.view(-1, 1, 1, 1)
    z = wide(t) * x + wide(1 - t) * k * e
    assert torch.allclose(a**2 + s**2, torch.ones_like(t)) and torch.allclose(vp_to_flow(3 * a, 3 * s, k), t, atol=1e-15)
    assert torch.allclose(z / wide(R), wide(a) * x + wide(s) * e)
    vp, flow = wide(a) * e - wide(s) * x, x - k * e
    assert torch.allclose(velocity_to_vp(flow, z, t, k), vp, atol=1e-12)
    assert torch.allclose(velocity_to_flow(vp, z / wide(R), t, k), flow, atol=1e-12)
    for i in range(5):  # one number for the batch
        one = slice(i, i + 1)
        assert torch.allclose(velocity_to_vp(flow[one], z[one], t[i].item(), k), vp[one], atol=1e-12)
        assert torch.allclose(velocity_to_flow(vp[one], (z / wide(R))[one], t[i], k), flow[one], atol=1e-12)
    with pytest.raises(ConfigError, match="do not fit"): velocity_to_vp(flow, z, torch.ones(2), k)


def test_signs_and_clocks():
    "JiT: to the picture, upwards. Flow matching of SD3: to the noise, downwards. VP: to the noise."
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    jit, sd3 = JiTFlowScheduler(), FlowMatchScheduler()
    assert jit.add_noise(one, none, 0.9) > jit.add_noise(one, none, 0.1) and jit.velocity(one, 0.0, none) > 0
    assert sd3.add_noise(one, none, 900.0) < sd3.add_noise(one, none, 100.0)
    n_minus_x = none - one
    assert torch.allclose(sd3.predict_original(n_minus_x, 300.0, sd3.add_noise(one, none, 300.0)), one)
    assert velocity_to_vp(one - none, 0.5 * one, 0.5) < 0  # the picture has a plus in the flow's velocity and a minus in the other
    assert math.isclose(velocity_to_vp(one, 0.5 * one, 0.5).item(), -(0.5**0.5), rel_tol=1e-6)
