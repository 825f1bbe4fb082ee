"Attention captures: they see what happens, change nothing, and stay within their memory."
import pytest
import torch

from dit_sr_kit.attention_captures import (AttentionCapture, attended_distance, attention_modules, capture_attention,
                                           grid_distance, joint_maps, rollout, spread_windows, store_rows, stream_share,
                                           window_maps)
from dit_sr_kit.core import ConfigError
from dit_sr_kit.layers import JointAttention, WindowAttention
from dit_sr_kit.models import DiT4SR, DiTSR


def joint_network(**changes):
    torch.manual_seed(0)
    config = dict(sample_size=8, patch_size=2, in_channels=3, out_channels=3, depth=2, num_heads=2, attention_head_dim=8,
                  joint_attention_dim=12, pooled_projection_dim=10, pos_embed_max_size=16, dual_attention_layers=(0,))
    model = DiT4SR(**{**config, **changes}).eval()
    with torch.no_grad():
        for p in model.control_parameters().values(): p.normal_(std=0.3)
    return model


def window_network():
    torch.manual_seed(0)
    return DiTSR(sample_size=16, in_channels=3, out_channels=3, cond_size=16, base_channels=32, channel_mult=(1,), depth=2,
                 attention_resolutions=(16,), hidden_size=32, attention_head_dim=16, dropout=0.0).eval()


def run(model, steps=(900.0, 100.0), batch=1, side=(8, 12)):
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    x, cond = draw(batch, 3, *side), draw(batch, 3, *side)
    more = (draw(batch, 5, 12), draw(batch, 10)) if isinstance(model, DiT4SR) else ()
    with torch.no_grad():
        for t in steps: x = model(x, torch.tensor(t), cond, *more)
    return x


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules())


CASES = [(joint_network, {}), (window_network, dict(side=(16, 16), steps=(3, 1)))]


@pytest.mark.parametrize("make, options", CASES)
@pytest.mark.parametrize("storage", ["uint8", "float16"])
def test_a_captured_run_is_bit_equal_and_leaves_no_hook(make, options, storage):
    model = make()
    plain, before = run(model, **options), {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with AttentionCapture(model, heads=(1, "mean"), storage=storage) as seen:
        assert hooks(model) > 0 and torch.equal(run(model, **options), plain)
    assert hooks(model) == 0 and torch.equal(run(model, **options), plain) and torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(seen.maps) == len(attention_modules(model)) * 2 * 2 and len(seen.timesteps) == 2
    for stored in seen.maps.values():
        assert stored.levels.dtype == getattr(torch, storage) and stored.levels.device.type == "cpu"
        assert (stored.weights().sum(-1) - 1).abs().max() < (0.02 if storage == "uint8" else 2e-3)
    assert seen.nbytes == sum(m.levels.numel() * (1 if storage == "uint8" else 2) + 4 * m.top.numel() for m in seen.maps.values())


@pytest.mark.parametrize("make, options", CASES)
def test_hooks_go_after_an_error_inside_and_outside(make, options):
    model = make()
    with pytest.raises(RuntimeError, match="stop"):
        with AttentionCapture(model): raise RuntimeError("stop")
    assert hooks(model) == 0
    with pytest.raises(ConfigError, match="max_bytes"):
        with AttentionCapture(model, max_bytes=5000) as seen: run(model, **options)
    assert hooks(model) == 0 and seen.nbytes <= 5000


def test_gradients_flow_as_before():
    model = joint_network()
    def gradient():
        model.zero_grad()
        g = torch.Generator().manual_seed(2)
        x = torch.randn(1, 3, 8, 8, generator=g)
        model(x, torch.tensor(500.0), x, torch.randn(1, 5, 12, generator=g), torch.randn(1, 10, generator=g)).square().sum().backward()
        return [p.grad.clone() for p in model.trainable_parameters() if p.grad is not None]
    plain = gradient()
    with AttentionCapture(model): watched = gradient()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched)) and len(plain) == len(watched)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("options", [{}, dict(version="v1"), dict(lr_integration=False), dict(qk_norm=None)])
def test_joint_maps_are_those_of_the_layer(text, options):
    torch.manual_seed(0)
    layer = JointAttention(16, 2, text=text, **options)
    hidden, words = torch.randn(1, 18, 16), torch.randn(1, 4, 16) if text else None
    with torch.no_grad():
        exact = layer.attention_weights(hidden, words)[0]
        made = joint_maps(layer, hidden, words, heads=(1, 0, "mean"), storage="float16", chunk=5)
        alone = joint_maps(layer, hidden, words, heads=(1,), storage="float16", chunk=7)
    for head, want in ((0, exact[0]), (1, exact[1]), ("mean", exact.mean(0))):
        torch.testing.assert_close(made[head].weights(), want, atol=1e-3, rtol=0)
    torch.testing.assert_close(alone[1].weights(), exact[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("shift", [0, 4])
def test_windows_are_put_back_to_their_places(shift):
    torch.manual_seed(0)
    layer, x = WindowAttention(16, 2, 8, shift), torch.randn(1, 16, 16, 24)
    with torch.no_grad():
        layer.bias_table.normal_()
        stored = spread_windows(window_maps(layer, x, heads=(1,), storage="float16")[1], (16, 24), 8, shift)
        weights = stored.weights()
        _, _, v = layer.windows_qkv(x)
        assert ((weights > 0).sum(-1) <= 64).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(16 * 24), atol=2e-3, rtol=0)
        # an identity projection of one head's values, moved by the full map, is what the layer does
        c = slice(8, 16)
        values = torch.nn.functional.linear(x[0].flatten(1).T, layer.qkv.weight[32:][c], layer.qkv.bias[32:][c])
        layer.proj = torch.nn.Identity()
        torch.testing.assert_close((weights @ values).T.reshape(8, 16, 24), layer(x)[0, c], atol=3e-3, rtol=0)


@pytest.mark.parametrize("power", [0.1, 1, 5])
def test_stored_rows_keep_their_promise(power):
    rows = (power * torch.randn(40, 200, generator=torch.Generator().manual_seed(0))).softmax(-1)
    for kind, bound in (("uint8", 1 / 255 + 1 / 510**2), ("float16", 2**-11)):
        stored = store_rows(rows, kind)
        assert ((stored.weights() - rows).abs() <= (bound + 1e-6) * stored.top[:, None]).all()
        assert torch.equal(stored.top, rows.amax(-1))
    assert store_rows(torch.zeros(2, 3)).weights().eq(0).all()


def test_grid_and_steps_and_sample():
    model = joint_network()
    with AttentionCapture(model, ["blocks.1.attn"], steps=(1,), sample=1) as seen: run(model, batch=2)
    assert list(seen.maps) == [("blocks.1.attn", "mean", 1)] and seen.grids == {"blocks.1.attn": (4, 6)}
    with AttentionCapture(model, ["blocks.1.attn"], steps=(1,)) as other: run(model, batch=2)
    assert not torch.equal(other.maps["blocks.1.attn", "mean", 1].levels, seen.maps["blocks.1.attn", "mean", 1].levels)
    with pytest.raises(ConfigError, match="no image 2"):
        with AttentionCapture(model, sample=2): run(model, batch=2)


def test_summaries_by_hand():
    weights = torch.tensor([[0.5, 0.1, 0.2, 0.1, 0.1], [0.0, 0.2, 0.3, 0.5, 0.0], [1.0, 0, 0, 0, 0], [0, 0, 0, 1.0, 0], [0, 0, 0, 0, 1.0]])
    share = stream_share(weights, 2)
    torch.testing.assert_close(share["noise->lr"], torch.tensor([0.3, 0.8]))
    torch.testing.assert_close(share["noise->text"], torch.tensor([0.1, 0.0]))
    assert grid_distance((2, 3))[0].tolist() == pytest.approx([0, 1, 2, 1, 2**0.5, 5**0.5])
    torch.testing.assert_close(attended_distance(weights[:2, 2:4], (1, 2)), torch.tensor([1 / 3, 3 / 8]))
    assert attended_distance(torch.zeros(2, 2), (1, 2)).isnan().all()
    chain = rollout([weights, weights, weights])
    torch.testing.assert_close(chain[2], torch.linalg.matrix_power((weights + torch.eye(5)) / 2, 3))
    torch.testing.assert_close(chain[2].sum(-1), torch.ones(5))


def test_states():
    model = joint_network()
    state = capture_attention(model, lambda: run(model), heads=(0, "mean"), steps=(1,), seed=4)
    assert state.streams == ["noise", "lr"] and state.grid == (4, 6) and state.tokens == 24 and state.meta == dict(seed=4)
    assert state.steps == [1] and state.timesteps == [100.0] and state.blocks == ["blocks.0.attn", "blocks.0.attn2", "blocks.1.attn"]
    assert state.weights("blocks.0.attn", 0, 1).shape == (53, 53) and state.weights("blocks.0.attn2", 0, 1).shape == (48, 48)
    small = window_network()
    options = CASES[1][1]
    windows = capture_attention(small, lambda: run(small, **options), steps=(0,))
    assert windows.streams == ["pixels"] and windows.weights(windows.blocks[0], "mean", 0).shape == (256, 256)


@pytest.mark.parametrize("call, message", [
    (lambda m: AttentionCapture(m, ["blocks.9"]), "Layers: blocks.0.attn"),
    (lambda m: AttentionCapture(m, heads=(2,)), "0 to 1, or 'mean'"),
    (lambda m: AttentionCapture(m, storage="int4"), "'uint8' or 'float16'"),
    (lambda m: attention_modules(torch.nn.Linear(2, 2)), "no joint attention"),
    (lambda m: capture_attention(m, lambda: None), "no map was collected in 0"),
    (lambda m: capture_attention(m, lambda: run(m), steps=(7,)), "no map was collected in 2"),
])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ConfigError, match=message): call(joint_network())
