"Captures: they see what happens, change nothing, and leave nothing behind."
import math

import pytest
import torch

from dit_sr_kit import captures
from dit_sr_kit.captures import (BRANCHES, Capture, FeatureCapture, capture_modulation, channel_modulations,
                                 conditioned_blocks, frequency_scales, full_response, low_high_ratio, mean_profile,
                                 rank_correlation, sign_test, stage_of, window_frequency, window_power)
from dit_sr_kit.core import ConfigError
from dit_sr_kit.layers import AdaFM
from dit_sr_kit.layers.adafm import symmetrise
from dit_sr_kit.models import DiTSR
from dit_sr_kit.spectra import radial_profile


def network(kind="adafm", **changes):
    "A small network whose modulation differs from step to step."
    torch.manual_seed(0)
    config = dict(sample_size=16, in_channels=3, out_channels=3, cond_size=16, base_channels=32, channel_mult=(1, 2),
                  attention_resolutions=(16, 8), depth=1, hidden_size=32, attention_head_dim=16, dropout=0.0,
                  time_conditioning=kind)
    model = DiTSR(**{**config, **changes}).eval()
    with torch.no_grad():  # AdaLN starts at zero: give it something to do
        for block in conditioned_blocks(model).values():
            if hasattr(block, "modulation"): block.modulation.linear.weight.normal_(0, 0.2)
    return model


def inputs(batch=1):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 16, 16, generator=g), torch.randn(batch, 3, 16, 16, generator=g)


def run(model, steps=(3, 2, 0), batch=1, keyword=False):
    x, cond = inputs(batch)
    with torch.no_grad():
        for t in steps: x = model(sample=x, timestep=torch.tensor(t), cond=cond) if keyword else model(x, t, cond)
    return x


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs)
               + len(m._forward_pre_hooks_with_kwargs) for m in model.modules())


@pytest.mark.parametrize("kind", ["adafm", "adaln"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_captured_run_is_bit_equal_and_leaves_no_hook(kind, prepared):
    model = network(kind)
    if prepared and hasattr(model, "prepare"): model.prepare(range(15))
    plain, state_before = run(model), {k: v.clone() for k, v in model.state_dict().items()}
    with FeatureCapture(model) as seen:
        assert hooks(model) > 0
        assert torch.equal(run(model), plain)
    assert hooks(model) == 0 and seen.timesteps == [3, 2, 0] and torch.equal(run(model), plain)
    assert all(torch.equal(v, state_before[k]) for k, v in model.state_dict().items())
    assert all(len(side) == 3 for unit in seen.windows.values() for side in unit.values())


@pytest.mark.parametrize("prepared", [False, True])
def test_power_after_adafm_is_power_before_times_squared_scale(prepared):
    model = network()
    if prepared and hasattr(model, "prepare"): model.prepare(range(15))
    state = capture_modulation(model, lambda: run(model, batch=2, keyword=True), note="x")
    assert state.kind == "adafm" and state.meta == {"note": "x"} and not state.pictures
    assert [b for b, _ in state.units[::2]] == list(conditioned_blocks(model)) and {b for _, b in state.units} == set(BRANCHES)
    for unit, (before, after) in state.windows.items():
        torch.testing.assert_close(after, state.response()[unit].square() * before, rtol=1e-3, atol=1e-7)
        came = before > 1e-6 * before.sum((-2, -1), keepdim=True)
        torch.testing.assert_close(state.effective_gain()[unit][came], state.response()[unit].abs()[came], rtol=1e-2, atol=1e-4)


def test_adaln_is_seen_and_flat():
    model = network("adaln")
    state = capture_modulation(model, lambda: run(model))
    assert state.kind == "adaln" and not state.scales
    for unit, response in state.response().items():
        assert low_high_ratio(response).abs().max() < 1e-12
        assert state.channels[unit].shape == (3, 3, 32)
    # one channel alone: its power is multiplied by (1 + scale)^2 at every frequency
    block = conditioned_blocks(model)["middle.blocks.0"]
    shift, scale, gate = channel_modulations(model, [3])["middle.blocks.0", "msa"][0].float()
    direct = block.modulation(model.time_embedding(torch.tensor([3])))
    torch.testing.assert_close(torch.stack([shift, scale, gate]), torch.stack([c[0] for c in direct[:3]]))


def test_scales_come_from_the_layers_and_are_symmetrised():
    model = network()
    found = frequency_scales(model, torch.arange(4))
    with torch.no_grad(): temb = model.time_embedding(torch.arange(4))
    for name, block in conditioned_blocks(model).items():
        for branch in BRANCHES:
            with torch.no_grad(): direct = getattr(block, f"scale_{branch}")(temb).double()
            torch.testing.assert_close(found[name, branch], symmetrise(direct))
    assert channel_modulations(model, [0]) == {} and frequency_scales(network("adaln"), [0]) == {}


@pytest.mark.parametrize("p", [1, 2, 4, 5, 7, 8])
def test_full_response_is_what_adafm_does_to_waves(p):
    scale = torch.randn(1, p, p // 2 + 1, generator=torch.Generator().manual_seed(p), dtype=torch.float64)
    x = torch.randn(1, 1, p, p, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    centred = lambda y: torch.fft.fftshift(torch.fft.fft2(y[0, 0]))
    torch.testing.assert_close(centred(AdaFM()(x, scale)), full_response(scale)[0] * centred(x))
    assert window_frequency(p)[p // 2, p // 2] == 0


def test_low_high_ratio():
    low = (window_frequency(8) <= 0.25).double()
    assert low.sum() == 13 and low_high_ratio(torch.ones(3, 8, 8)).tolist() == [0, 0, 0]
    torch.testing.assert_close(low_high_ratio(1 + low), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(low_high_ratio(-1 - low), torch.tensor(1.0, dtype=torch.float64))
    only_mean = torch.ones(8, 8, dtype=torch.float64)
    only_mean[4, 4] = 50
    assert low_high_ratio(only_mean, keep_mean=False) == 0 < low_high_ratio(only_mean)


def test_powers():
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 7
    centred = x - x.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(window_power(x, 8).sum(), centred.square().mean())
    torch.testing.assert_close(mean_profile(x), radial_profile(x.flatten(0, 1)[:, None])[1].mean(0))


@pytest.mark.parametrize("fails", ["in the run", "while hooks are set"])
def test_hooks_go_after_an_exception(fails, monkeypatch):
    model = network()
    capture = FeatureCapture(model)
    if fails == "while hooks are set":
        def watch(self):
            yield next(iter(self.blocks.values())).norm1, "output", lambda x: None
            raise RuntimeError("no")
        monkeypatch.setattr(FeatureCapture, "watch", watch)
    with pytest.raises(RuntimeError):
        with capture: raise RuntimeError("no")
    assert hooks(model) == 0


def test_foreign_hooks_stay():
    model = network()
    handle = model.conv_in.register_forward_hook(lambda *a: None)
    with FeatureCapture(model): run(model)
    assert hooks(model) == 1
    handle.remove()


def test_two_captures_at_once_and_one_twice():
    model = network()
    with FeatureCapture(model) as a, FeatureCapture(model, ["middle.blocks.0"]) as b: run(model)
    assert hooks(model) == 0 and list(b.blocks) == ["middle.blocks.0"]
    for unit in b.windows: torch.testing.assert_close(a.stacked()[unit][0], b.stacked()[unit][0])
    with a:
        with pytest.raises(ConfigError, match="running already"):
            with a: pass


def test_gradients_flow_as_before():
    model, (x, cond) = network(), inputs()
    grads = []
    for watched in (False, True):
        model.zero_grad()
        capture = FeatureCapture(model)
        if watched:
            with capture: model(x, 1, cond).square().sum().backward()
        else: model(x, 1, cond).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_other_captures_fit_into_the_base():
    "Attention of one head at chosen steps, as bytes."
    class Attention(Capture):
        def __init__(self, model): super().__init__(model); self.maps = []
        def wanted(self): return self.timesteps[-1] == 2
        def watch(self):
            attention = self.model.middle.blocks[0].attn
            yield attention, "input", lambda x: self.maps.append((255 * attention.attention_weights(x)[:, :, 0]).to(torch.uint8))
    model = network()
    plain = run(model)
    with Attention(model) as seen: assert torch.equal(run(model), plain)
    assert len(seen.maps) == 1 and seen.maps[0].dtype == torch.uint8 and seen.maps[0].shape[-2:] == (64, 64)


@pytest.mark.parametrize("call, message", [
    (lambda m: conditioned_blocks(torch.nn.Linear(2, 2)), "no block with AdaFM or AdaLN"),
    (lambda m: FeatureCapture(m, ["nowhere"]), "middle.blocks.0"),
    (lambda m: capture_modulation(m, lambda: None), "not called"),
    (lambda m: capture_modulation(m, lambda: m(*[torch.cat([v, v]) if v.ndim else v for v in (inputs()[0],)],
                                               torch.tensor([1, 2]), torch.cat([inputs()[1]] * 2))), "one time step"),
])
def test_errors_say_what_to_do(call, message):
    model = network()
    with pytest.raises(ConfigError, match=message): call(model)
    assert hooks(model) == 0
    with pytest.raises(NotImplementedError): list(Capture(model).watch())


def test_stages():
    names = ["encoder.0.layer.blocks.1", "middle.blocks.0", "decoder.3.layer.blocks.0"]
    assert [stage_of(n) for n in names] == ["encoder 0", "middle", "decoder 3"]


def test_statistics():
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1) and rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0 and rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert sign_test(0, 5) == pytest.approx(2 / 32) == sign_test(5, 5) and sign_test(3, 6) == 1 and sign_test(0, 1) == 1
    assert sign_test(9, 24) == pytest.approx(2 * sum(math.comb(24, k) for k in range(15, 25)) / 2**24)
    assert captures.sign_test(18, 24) < 0.05 < captures.sign_test(17, 24)
