"JiT and JiT-SR: sizes, sequences, remedies, errors, and the way through pipeline and training."
import itertools

import pytest
import torch

from dit_sr_kit.core import ConfigError
from dit_sr_kit.images import resize
from dit_sr_kit.layers.jit_blocks import RMSNorm, RotaryAttention, SwiGLU, position_table, rotary_angles, rotate_pairs, unpatchify
from dit_sr_kit.losses import flow_loss, flow_times, velocity_loss
from dit_sr_kit.models import JiT, JiTSR
from dit_sr_kit.models.autoencoders import IdentityAutoencoder
from dit_sr_kit.models.jit_sr import JiTTrunk, shrink
from dit_sr_kit.presets import build, preset
from dit_sr_kit.schedulers import JiTFlowScheduler

SIZES = dict(sample_size=16, patch_size=4, hidden_size=24, depth=3, num_heads=2, bottleneck_size=6)
CLASSES = dict(SIZES, num_classes=5, num_class_tokens=3, class_token_start=1)
SR = dict(SIZES, lr_size=4, lr_patch_size=1, lr_start=1)
REMEDIES = ("type_embedding", "lr_rotary", "lr_qkv", "lr_clean_time", "lr_isolated")


def awake(model, seed=0):
    "No layer at zero."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed": p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (1 if "norm" in name else 0))
    return model.eval()


def batch(seed=0, side=16, count=2):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run(model, *inputs):
    with torch.no_grad(): return model(*inputs)


# ---- sizes -----------------------------------------------------------------------------------------------------

def count(model): return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("patch,gated,classes,expected", [
    (16, False, 1000, (131_320_320, 459_139_808, 952_842_048)), (32, False, 1000, (133_387_008, 461_796_320, 956_383_296)),
    (16, False, 0, (130_526_976, 458_082_016, 951_519_808)), (32, False, 0, (132_593_664, 460_738_528, 955_061_056)),
    (16, True, 0, (137_614_080, 483_272_416, 1_003_989_568)), (32, True, 0, (139_680_768, 485_928_928, 1_007_530_816))])
def test_released_sizes(patch, gated, classes, expected):
    sizes = ({}, dict(hidden_size=1024, depth=24, num_heads=16), dict(hidden_size=1280, depth=32, num_heads=16, bottleneck_size=256))
    with torch.device("meta"):
        found = [JiT(sample_size=16 * patch, patch_size=patch, gated=gated, num_classes=classes, **size) for size in sizes]
    assert tuple(count(model) for model in found) == expected
    assert [count(m) - sum(p.numel() for p in m.parameters() if p.requires_grad) for m in found] == [196_608, 262_144, 327_680]


@pytest.mark.parametrize("change,extra", [
    (dict(type_embedding=True), 1_536), (dict(lr_qkv=True, lr_start=4), 8 * 1_771_776), (dict(lr_clean_time=True), 0),
    (dict(lr_rotary=True), 0), (dict(lr_isolated=True), 0), (dict(skip=True), 0), (dict(lr_position="fixed"), -196_608),
    (dict(lr_qkv=True, lr_start=0), 12 * 1_771_776)])
def test_cost_of_a_remedy(change, extra):
    with torch.device("meta"): assert count(JiTSR(**change)) == 130_828_800 + extra


# ---- a fresh network -------------------------------------------------------------------------------------------

def test_a_fresh_network_answers_zero():
    assert not run(JiT(**CLASSES), batch(), 0.3).any()
    for how in ("token", "concat"):
        assert not run(JiTSR(**SR, conditioning=how), batch(), 0.3, batch(1, 4)).any()
        model = JiTSR(**SR, conditioning=how, skip=True)
        assert torch.equal(run(model, batch(), 0.3, batch(1, 4)), resize(batch(1, 4), scale=4))


def test_initialisation():
    model = JiTSR(**SR, type_embedding=True, lr_qkv=True)
    assert not model.type_embed[0].any() and model.type_embed[1].any()
    assert 0.01 < model.lr_positions.std() < 0.03 and model.lr_positions.mean().abs() < 0.01
    assert model.trunk.blocks[0].attn.prefix_qkv is None
    for block in model.trunk.blocks[1:]: assert torch.equal(block.attn.prefix_qkv.weight, block.attn.to_qkv.weight)
    assert not model.pos_embed.requires_grad and torch.equal(model.pos_embed[0], position_table(4, 4, 24))


def test_dropout_acts_in_the_middle_half():
    model = JiT(**dict(CLASSES, depth=8), attn_dropout=0.1, proj_dropout=0.2)
    assert [block.attn.dropout for block in model.trunk.blocks] == [0, 0, 0.1, 0.1, 0.1, 0.1, 0, 0]
    assert [block.mlp.dropout.p for block in model.trunk.blocks] == [0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0]


# ---- parts -----------------------------------------------------------------------------------------------------

def test_rotations_see_distances():
    "A query and a key, both rotated, know how far apart their tokens are, not where they lie."
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    angles = rotary_angles(4, 4, 16)
    turned = lambda x, row, col: rotate_pairs(x[None], angles[None, 4 * row + col])[0]
    assert torch.allclose(turned(q, 0, 1) @ turned(k, 2, 2), turned(q, 1, 0) @ turned(k, 3, 1))
    assert not torch.allclose(turned(q, 0, 1) @ turned(k, 2, 2), turned(q, 0, 1) @ turned(k, 2, 3))
    assert torch.equal(turned(q, 0, 0), q) and torch.allclose(turned(q, 3, 2).norm(), q.norm())


def test_positions_of_a_coarser_grid():
    "A token twice as wide lies between the tokens that it covers."
    coarse, fine = rotary_angles(2, 2, 8, stride=2.0), rotary_angles(4, 4, 8).view(4, 4, -1)
    assert torch.allclose(coarse.view(2, 2, -1), fine.unflatten(0, (2, 2)).unflatten(2, (2, 2)).mean((1, 3)))
    assert torch.equal(rotary_angles(4, 4, 8, stride=1.0), rotary_angles(4, 4, 8))


def test_norm_in_half_precision():
    x = 300 * torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(24)
    assert (norm(x.half()).float() - norm(x)).abs().max() < 5e-3 and norm(x.half()).dtype == torch.float16
    assert norm.double()(x.double()).dtype == torch.float64


def test_patches():
    "Patches come out in the order in which they went in; channels are last inside a patch."
    tokens = torch.arange(4 * 12.0).view(1, 4, 12)
    picture = unpatchify(tokens, 2, 2)
    assert picture.shape == (1, 3, 4, 4) and picture[0, :, 0, 0].tolist() == [0, 1, 2] and picture[0, 0, 0, :].tolist() == [0, 3, 12, 15]
    assert SwiGLU(1024).inner_size == 2730 and SwiGLU(768).inner_size == 2048 and SwiGLU(1280).inner_size == 3413


def test_separate_maps_start_as_the_shared_ones():
    attention = RotaryAttention(24, 2, prefix_qkv=True)
    attention.prefix_qkv.load_state_dict(attention.to_qkv.state_dict())
    x, angles = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(7, 6)
    assert torch.allclose(attention(x, angles, 3), attention(x, angles, 0), atol=1e-6)


# ---- sequences -------------------------------------------------------------------------------------------------

def test_class_labels():
    model = awake(JiT(**CLASSES))
    null = run(model, batch(), 0.3)
    assert torch.equal(run(model, batch(), 0.3, torch.tensor([5, 5])), null)
    out = run(model, batch(), torch.tensor([0.3, 0.3]), torch.tensor([0, 5]))
    assert torch.allclose(out[1], null[1], atol=1e-6) and not torch.allclose(out[0], null[0], atol=1e-3)


@pytest.mark.parametrize("conditioning", ["token", "concat"])
@pytest.mark.parametrize("gated", [False, True])
def test_double_follows_single(conditioning, gated):
    model = awake(JiTSR(**SR, conditioning=conditioning, gated=gated))
    single, double = (run(model.to(d), batch().to(d), 0.4, batch(1, 4).to(d)) for d in (torch.float32, torch.float64))
    assert double.dtype == torch.float64 and (single - double).abs().max() < 1e-4


@pytest.mark.parametrize("remedies", [(), *itertools.combinations(REMEDIES, 1), REMEDIES])
def test_remedies(remedies):
    "Every picture stands for itself, the LR picture matters, gradients reach every weight."
    model = awake(JiTSR(**SR, **dict.fromkeys(remedies, True)))
    out = run(model, batch(), 0.4, batch(1, 4))
    assert torch.allclose(run(model, batch()[1:], 0.4, batch(1, 4)[1:]), out[1:], atol=1e-5)
    assert not torch.allclose(run(model, batch(), 0.4, batch(2, 4)), out, atol=1e-3)
    if remedies: assert not torch.allclose(run(awake(JiTSR(**SR)), batch(), 0.4, batch(1, 4)), out, atol=1e-3)
    model(batch(), 0.4, batch(1, 4)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["pos_embed"]
    assert all(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("conditioning,skipped", [("token", False), ("concat", False), ("concat", True)])
def test_every_weight_is_used(conditioning, skipped):
    "No embedder of the other way, which would hide that the wrong one is called."
    model = awake(JiTSR(**SR, conditioning=conditioning, pooled=not skipped))
    model(batch(), 0.4, batch(1, 4)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == ["pos_embed"]
    assert (model.lr_embed is None) == skipped


def test_isolated_clean_tokens_do_not_see_the_noisy_picture():
    "With a clean time of their own, without pooling: what leaves the LR tokens depends on the LR picture alone."
    model = awake(JiTSR(**SR, lr_isolated=True, lr_clean_time=True))
    found = []
    handle = model.trunk.blocks[2].register_forward_hook(lambda m, inputs, output: found.append(output[:, :16]))
    for seed, t in ((0, 0.1), (5, 0.9)): run(model, batch(seed), t, batch(1, 4))
    handle.remove()
    assert torch.allclose(*found, atol=1e-6)
    open_model = awake(JiTSR(**SR))
    handle = open_model.trunk.blocks[2].register_forward_hook(lambda m, inputs, output: found.append(output[:, :16]))
    for seed in (0, 5): run(open_model, batch(seed), 0.1, batch(1, 4))
    handle.remove()
    assert not torch.allclose(*found[2:], atol=1e-3)


def test_concat_takes_both_sizes():
    for pooled in (True, False):
        model = awake(JiTSR(**SR, conditioning="concat", pooled=pooled))
        lr = batch(1, 4)
        assert torch.allclose(run(model, batch(), 0.4, lr), run(model, batch(), 0.4, resize(lr, scale=4)), atol=1e-5)


def test_shrink():
    lr = torch.rand(1, 3, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (2, 3, 4): assert torch.allclose(shrink(resize(lr, scale=scale), scale), lr, atol=1e-12)


def test_other_sizes():
    model = awake(JiTSR(**SR, lr_position="fixed", any_size=True))
    assert model.size_multiple == 4 and JiTSR(**SR).size_multiple == 16
    out = run(model, torch.cat([batch()] * 2, dim=-1)[:, :, :12], 0.4, torch.cat([batch(1, 4)] * 2, dim=-1)[:, :, :3])
    assert out.shape == (2, 3, 12, 32) and torch.isfinite(out).all()
    fixed = awake(JiTSR(**SR, lr_position="fixed"))
    assert torch.equal(run(model, batch(), 0.4, batch(1, 4)), run(fixed, batch(), 0.4, batch(1, 4)))


def test_saving(tmp_path):
    for model, inputs in ((awake(JiT(**CLASSES)), ()), (awake(JiTSR(**SR, lr_qkv=True, type_embedding=True)), (batch(1, 4),))):
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(run(again, batch(), 0.3, *inputs), run(model, batch(), 0.3, *inputs))


# ---- errors ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call,words", [
    (lambda: JiT(**dict(CLASSES, sample_size=18)), "Nearest: 16"), (lambda: JiT(**dict(CLASSES, class_token_start=3)), "expected 0 to 2"),
    (lambda: JiT(**dict(CLASSES, num_heads=5)), "num_heads 5"), (lambda: JiT(**dict(CLASSES, hidden_size=20))(batch(), 0.1), "head_dim 10"),
    (lambda: JiT(**CLASSES)(batch(side=18), 0.1), "multiples of the patch"), (lambda: JiT(**CLASSES)(batch(side=20), 0.1), "16 x 16 alone"),
    (lambda: JiT(**CLASSES)(batch()[:, :2], 0.1), r"expected \[b, 3, h, w\]"), (lambda: JiT(**CLASSES)(batch()[0], 0.1), "expected"),
    (lambda: JiT(**CLASSES)(batch(), 1.5), "not possible"), (lambda: JiT(**CLASSES)(batch(), torch.tensor([0.1, -0.1])), "not possible"),
    (lambda: JiT(**CLASSES)(batch(), float("nan")), "not possible"), (lambda: JiT(**CLASSES)(batch(), torch.tensor([0.1, 0.2, 0.3])), "one per"),
    (lambda: JiT(**CLASSES)(batch(), 0.1, torch.tensor([0, 6])), "0 to 4"), (lambda: JiT(**CLASSES)(batch(), 0.1, torch.tensor([-1, 0])), "0 to 4"),
    (lambda: JiT(**CLASSES)(batch(), 0.1, torch.tensor([0.5, 1])), "whole"), (lambda: JiT(**CLASSES)(batch(), 0.1, torch.tensor([1])), "2 whole"),
    (lambda: JiT(**dict(SIZES, num_classes=0))(batch(), 0.1, torch.tensor([1, 1])), "no classes"),
    (lambda: JiTSR(**SR, conditioning="cat"), "conditioning"), (lambda: JiTSR(**dict(SR, lr_size=5)), "must divide"),
    (lambda: JiTSR(**dict(SR, lr_patch_size=3)), "multiple"), (lambda: JiTSR(**SR, conditioning="concat", lr_qkv=True), "lr_qkv"),
    (lambda: JiTSR(**SR, any_size=True), "lr_position"), (lambda: JiTSR(**SR, lr_position="rope"), "lr_position"),
    (lambda: JiTSR(**SR)(batch(), 0.1, batch(1, 8)), "scale 4 needs"), (lambda: JiTSR(**SR)(batch(), 0.1, batch(1, 16)), "scale 4 needs"),
    (lambda: JiTSR(**SR)(batch(), 0.1, batch(1, 4, 1)), "scale 4 needs"), (lambda: JiTSR(**SR, conditioning="concat")(batch(), 0.1, batch(1, 8)), "or enlarged"),
    (lambda: JiTSR(**dict(SR, lr_patch_size=2, sample_size=24, lr_size=6), lr_position="fixed", any_size=True)(batch(side=12), 0.1, batch(1, 3)), "lr_patch_size"),
    (lambda: JiTTrunk(8, 2, 1, 3, start=-1), "expected 0 to 1")])
def test_errors(call, words):
    with pytest.raises(ConfigError, match=words): call()


# ---- losses, training, pipeline -----------------------------------------------------------------------------------

def test_velocity_loss():
    scheduler, g = JiTFlowScheduler(), torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(3, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    loss, each = velocity_loss(y, x, z, t, scheduler)
    assert torch.allclose(each, (x - y).square().mean((1, 2, 3)) / (1 - t).clamp(min=0.05)**2) and torch.allclose(loss, each.mean())
    assert torch.equal(flow_times(4, torch.Generator().manual_seed(1)), flow_times(4, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("conditioning", ["token", "concat"])
def test_flow_loss_goes_down(conditioning):
    torch.manual_seed(0)
    model = JiTSR(**SR, conditioning=conditioning)
    hr, scheduler = ((batch(side=1, count=8) + 1) / 2).expand(8, 3, 16, 16), JiTFlowScheduler()  # plain colours
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for step in range(40):
        loss, error, t = flow_loss(model, scheduler, IdentityAutoencoder(), hr, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert error.shape == t.shape == (8,) and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    plain, error, _ = flow_loss(model, scheduler, IdentityAutoencoder(), hr, torch.Generator().manual_seed(0), weighting=0.0)
    assert torch.allclose(plain, error.mean())


def test_the_mode_reaches_the_sampler():
    "The way to condition is part of the network: sampling cannot take another one than training."
    names = ["jit-sr-b16", "jit-sr-l16", "jit-sr-b16-concat", "jit-sr-l16-concat"]
    assert [build(name, device="meta").config.conditioning for name in names] == ["token", "token", "concat", "concat"]
    for name in names:
        row = preset(name)
        assert row.process is JiTFlowScheduler and row.scale == 4
        assert row.process(**row.scheduler).num_inference_steps <= 1 / row.process().config.t_eps


def test_pipeline(tmp_path):
    from dit_sr_kit import SRPipeline
    model = awake(JiTSR(**SR, lr_position="fixed", any_size=True))
    pipe = SRPipeline(model, JiTFlowScheduler(default_steps=3), IdentityAutoencoder(), 4, "jit-sr-test").to("cpu")
    lr = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    out = pipe(lr, seed=0, record=True, progress=False)
    assert out.images[0].size == (28, 20) and len(out.trajectory) == 5
    pipe.save_pretrained(tmp_path)
    again = SRPipeline.from_pretrained(tmp_path, device="cpu")(lr, seed=0, progress=False)
    assert again.images[0].tobytes() == out.images[0].tobytes()


def test_a_type_embedding_is_a_bias():
    "The remedy can be folded into biases that the network has anyway."
    for more in ({}, dict(lr_clean_time=True), dict(pooled=False)):
        typed, plain = awake(JiTSR(**SR, type_embedding=True, **more)), awake(JiTSR(**SR, **more))
        weights = typed.state_dict()
        noisy, lr = weights.pop("type_embed")
        weights["patch_embed.proj2.bias"] = weights["patch_embed.proj2.bias"] + noisy  # (J-30)
        weights["lr_embed.proj2.bias"] = weights["lr_embed.proj2.bias"] + lr
        if more.get("pooled", True): weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] - lr
        plain.load_state_dict(weights)
        assert torch.allclose(run(typed, batch(), 0.3, batch(1, 4)), run(plain, batch(), 0.3, batch(1, 4)), atol=1e-5)


def test_rotation_tells_a_query_where_a_key_lies():
    "As published all LR keys of equal content have one score; rotated ones have the highest at the query's own place."
    attention = RotaryAttention(24, 1)
    with torch.no_grad(): attention.to_qkv.weight[:24], attention.to_qkv.bias[:24] = attention.to_qkv.weight[24:48], attention.to_qkv.bias[24:48]
    places, tokens = rotary_angles(4, 4, 24), torch.randn(1, 1, 24).expand(1, 32, 24)
    for turned, peaks in ((torch.zeros_like(places), False), (places, True)):
        q, k, _ = attention.heads(tokens, torch.cat([turned, places]))
        scores = q[0, 0, 16:] @ k[0, 0, :16].T  # (J-31)
        if peaks: assert torch.equal(scores.argmax(1), torch.arange(16))
        else: assert torch.allclose(scores.max(1).values, scores.min(1).values, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_ceiling_of_the_guard(method):
    "What the guard leaves of the noise bounds PSNR; up to 20 intervals nothing is left, nor with `final_estimate`."
    x, noise = batch(4).double().clamp(-1, 1), torch.randn(batch(4).shape, dtype=torch.float64)

    def error(**config):
        scheduler = JiTFlowScheduler(method=method, **config)
        z = scheduler.init_sample(x, noise=noise)
        for t in scheduler.timesteps: z = scheduler.step(x, t, z).prev_sample
        return (z - x).square().mean()

    start = (noise - x).square().mean()
    for steps, left in ((20, 0), (50, 0.0144 if method == "euler" else 0.0171), (100, 0.0164 if method == "euler" else 0.0181)):
        assert abs((error(default_steps=steps) / start) ** 0.5 - left) < 1e-4  # (J-8), (J-8b)
        assert error(default_steps=steps, final_estimate=True) < 1e-20


def test_the_plain_reading_of_the_bench():
    from tests.bench import jit

    (label, times, note), = jit.jit(quick=True)
    assert float(note.split("largest difference ")[1].split(",")[0]) < 1e-5
