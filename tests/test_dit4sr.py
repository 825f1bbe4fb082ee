"Joint attention, the DiT4SR network, its official names: properties, errors, files."
import json

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import save_file

from dit_sr_kit import CheckpointError, ConfigError
from dit_sr_kit.checkpoints import checkpoint_report, load_official
from dit_sr_kit.core import make_generator
from dit_sr_kit.layers import JointAttention, stream_maps
from dit_sr_kit.models import DiT4SR
from dit_sr_kit.models.dit4sr import InjectedMLP, PatchTokens
from dit_sr_kit.official.common import official_state
from dit_sr_kit.official.dit4sr import DIT4SR, merge_dit4sr, sd35_medium_config
from dit_sr_kit.presets import build

OFFICIAL = sd35_medium_config(sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
                              num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
                              pooled_projection_dim=10, pos_embed_max_size=16, dual_attention_layers=(0,))


def network(random_control=True, **changes):
    "A small network; every new layer random, so that each of them shows."
    torch.manual_seed(0)
    model = DIT4SR.from_config(OFFICIAL | changes).eval()
    if random_control:
        with torch.no_grad():
            for p in model.control_parameters().values(): p.normal_(std=0.2)
    return model


def inputs(height=8, width=8, batch=2, dtype=torch.float32):
    "Noisy latent, time step, LR latent, text, pooled text."
    g = make_generator(1)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    return [draw(batch, 4, height, width), torch.tensor([700.0, 31.5])[:batch], draw(batch, 4, height, width),
            draw(batch, 5, 12), draw(batch, 10)]


def official_weights(model, unused=True, table=True):
    "What a released file of this network holds."
    state = {key: value.detach().clone() for key, value in official_state(DIT4SR, model).items()}
    if unused: state |= {key: torch.randn(shape) for key, shape in DIT4SR.unused(model).items()}
    if table:
        theirs = PatchEmbed(8, 8, 2, 4, 16, pos_embed_max_size=16)
        state["pos_embed.pos_embed"] = theirs.pos_embed.clone()
    return state


# --- joint attention

def attention(**changes):
    torch.manual_seed(0)
    return JointAttention(**{**dict(hidden_size=16, num_heads=2), **changes}).double().requires_grad_(False)


def tokens(n=6, m=3):
    g = make_generator(2)
    return (torch.randn(2, 2 * n, 16, generator=g, dtype=torch.float64),
            torch.randn(2, m, 16, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("changes", [{}, dict(version="v1"), dict(qk_norm=None), dict(lr_integration=False)])
@pytest.mark.parametrize("text", [True, False])
def test_weights_explain_the_result(changes, text):
    "The map beside the fused path gives the same result as the fused path."
    layer, (x, c) = attention(text=text, lr_residual=False, **changes), tokens()
    args = (x, c) if text else (x,)
    weights, (_, _, v) = layer.attention_weights(*args, chunk=4), layer.project(*args)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    out, out_text = layer(*args)
    torch.testing.assert_close(out, torch.cat([layer.to_out(mixed[:, :6]), layer.lr_out(mixed[:, 6:12])], 1))
    if text: torch.testing.assert_close(out_text, layer.text_out(mixed[:, 12:]))
    else: assert out_text is None
    torch.testing.assert_close(layer.attention_weights(*args, head_mean=True), weights.mean(1))


def test_v1_keys():
    "v1 keys of the LR stream know nothing of the LR stream."
    x, c = tokens()
    other = x.clone()
    other[:, 6:] = torch.randn(2, 6, 16, generator=make_generator(3), dtype=torch.float64)
    for version, moves in (("v1", False), ("r1", True)):
        layer = attention(version=version)
        maps = [stream_maps(layer.attention_weights(value, c), 6)["noise->lr"] for value in (x, other)]
        assert torch.equal(*maps) != moves
        keys = [layer.project(value, c)[1][:, :, 6:12] for value in (x, other)]
        assert torch.equal(*keys) != moves
    noise = layer.project(x, c)[1][:, :, :6]
    torch.testing.assert_close(attention(version="v1").project(x, c)[1][:, :, 6:12], layer.norm_k(noise))
    plain = [attention(version=version, qk_norm=None)(x, c)[0] for version in ("v1", "r1")]
    assert torch.equal(*plain), "without the norm there is no difference"


def test_streams_apart():
    "Ablation A: no word passes between the LR stream and the others inside attention."
    layer, (x, c) = attention(lr_integration=False), tokens()
    maps = stream_maps(layer.attention_weights(x, c), 6)
    assert set(maps) == {f"{a}->{b}" for a in ("noise", "lr", "text") for b in ("noise", "lr", "text")}
    for name in ("noise->lr", "text->lr", "lr->noise", "lr->text"): assert not maps[name].any()
    assert set(stream_maps(attention(text=False).attention_weights(x), 6)) == {f"{a}->{b}" for a in ("noise", "lr") for b in ("noise", "lr")}


def test_residual():
    "The residual is the module's own input, before the output projection."
    (x, c), on, off = tokens(), attention(), attention(lr_residual=False)
    difference = (on(x, c)[0] - off(x, c)[0])
    assert not difference[:, :6].any()
    torch.testing.assert_close(difference[:, 6:], x[:, 6:] @ on.lr_out.weight.T)


@pytest.mark.parametrize("call,word", [
    (lambda: attention(num_heads=3), "divisor of 16"), (lambda: attention(version="v2"), "version is 'v2'"),
    (lambda: attention(qk_norm="layer_norm"), "qk_norm is 'layer_norm'"),
    (lambda: attention()(tokens()[0][:, :11], tokens()[1]), "even number"),
    (lambda: attention()(tokens()[0]), "built with text and got none"), (lambda: attention(text=False)(*tokens()), "built without text")])
def test_attention_errors(call, word):
    with pytest.raises(ConfigError, match=word): call()


# --- parts of the network

@pytest.mark.parametrize("height,width", [(8, 8), (6, 14), (32, 2), (2, 30)])
def test_places(height, width):
    "Only the middle of the table is computed; diffusers cuts it out of the whole."
    torch.manual_seed(0)
    theirs = PatchEmbed(8, 8, 2, 4, 16, pos_embed_max_size=16)
    ours = PatchTokens(8, 2, 4, 16, 16)
    ours.proj.load_state_dict(theirs.proj.state_dict())
    latent = torch.randn(2, 4, height, width)
    torch.testing.assert_close(ours(latent), theirs(latent), atol=1e-6, rtol=0)


def test_injection_knows_the_grid():
    "An impulse in one LR token reaches the eight neighbours of its noise token, on a grid that is not square."
    torch.manual_seed(0)
    mlp = InjectedMLP(4).double()
    eta = torch.zeros(1, 3 * 5, 16, dtype=torch.float64)
    eta[0, 1 * 5 + 3] = 1
    bias = mlp.injection(torch.zeros_like(eta), 3, 5)
    reached = (mlp.injection(eta, 3, 5) - bias)[0].abs().sum(-1).reshape(3, 5) > 0
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[0:3, 2:5] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize("changes", [{}, dict(version="v1"), dict(lr_integration=False), dict(lr_residual=False),
                                     dict(lr_injection="linear"), dict(lr_injection=None), dict(qk_norm=None)])
@torch.no_grad()
def test_sizes_and_batches(changes):
    "Any even size; samples do not hear of each other; one number or one per sample as time step."
    model = network(**changes)
    for height, width in ((8, 8), (4, 10), (10, 4), (2, 2)):
        sample, timestep, cond, text, pooled = inputs(height, width)
        out = model(sample, timestep, cond, text, pooled)
        assert out.shape == sample.shape
        one = model(sample[:1], 700, cond[:1], text[:1], pooled[:1])
        torch.testing.assert_close(one, out[:1], atol=1e-5, rtol=1e-5)
    assert model.to(torch.bfloat16)(*inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.no_grad()
def test_not_square_is_still_sd3():
    "Where the released code stops, we compare with plain SD3, which takes any size."
    model = network(lr_integration=False, lr_injection=None)
    theirs = SD3Transformer2DModel(**OFFICIAL).eval()
    theirs.load_state_dict({key: value for key, value in official_weights(model).items() if key in theirs.state_dict()})
    sample, timestep, cond, text, pooled = inputs(6, 12)
    torch.testing.assert_close(model(sample, timestep, cond, text, pooled),
                               theirs(sample, text, pooled, timestep, return_dict=False)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_turning_the_picture():
    "Transposing latents, kernels and places transposes the result: rows and columns are treated alike."
    model = network()
    sample, timestep, cond, text, pooled = inputs(4, 8)
    before = model(sample, timestep, cond, text, pooled)
    patches = model.patch_embed.proj.weight
    patches.copy_(patches.transpose(2, 3).clone())
    for block in model.blocks: block.ff.inject.weight.copy_(block.ff.inject.weight.transpose(2, 3).clone())
    out = model.proj_out
    for value in (out.weight, out.bias):
        value.copy_(value.unflatten(0, (2, 2, 4)).transpose(0, 1).flatten(0, 2).clone())
    places = PatchTokens.forward

    def turned(self, latent):  # the places of the picture as it was
        straight = places(self, latent.transpose(2, 3)) - self.proj(latent.transpose(2, 3)).flatten(2).transpose(1, 2)
        h, w = latent.shape[2] // 2, latent.shape[3] // 2
        return self.proj(latent).flatten(2).transpose(1, 2) + straight.unflatten(1, (w, h)).transpose(1, 2).flatten(1, 2)

    PatchTokens.forward = turned
    try: after = model(sample.transpose(2, 3), timestep, cond.transpose(2, 3), text, pooled)
    finally: PatchTokens.forward = places
    torch.testing.assert_close(after.transpose(2, 3), before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_switches():
    "Every switch changes the result; the strength scales the injection."
    args, full = inputs(), network()
    reference = full(*args)
    weights = official_weights(full)
    for changes in (dict(version="v1"), dict(lr_integration=False), dict(lr_residual=False), dict(lr_injection=None),
                    dict(injection_scale=1.0)):
        assert (load_official("dit4sr", weights, OFFICIAL | changes)(*args) - reference).abs().max() > 1e-3, changes
    off = load_official("dit4sr", weights, OFFICIAL | dict(injection_scale=0.0))(*args)
    torch.testing.assert_close(off, load_official("dit4sr", weights, OFFICIAL | dict(lr_injection=None))(*args))
    mlp = InjectedMLP(4, injection_scale=1.2)
    eta = torch.randn(1, 4, 16)
    message = mlp.injection(eta, 2, 2)
    mlp.injection_scale = 0.6
    torch.testing.assert_close(message, 2 * mlp.injection(eta, 2, 2))


@torch.no_grad()
def test_last_block():
    "Its text queries decide nothing, its LR stream does."
    model, args = network(), inputs()
    before = model(*args)
    last = model.blocks[-1]
    assert last.attn.text_out is None and not hasattr(last, "ff_text")
    last.attn.text_q.weight.normal_()
    torch.testing.assert_close(model(*args), before, atol=1e-6, rtol=0)
    last.attn.lr_out.weight.normal_()
    assert (model(*args) - before).abs().max() > 1e-3


def test_what_is_trained():
    model = network(random_control=False).freeze_base()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(model.control_parameters())
    for name, p in model.control_parameters().items():
        assert ".lr_out." in name or not p.any(), name
    for block in model.blocks: assert torch.equal(block.attn.lr_out.weight, block.attn.to_out.weight)
    model.blocks[0].attn.to_out.weight.data.normal_()
    assert not torch.equal(model.blocks[0].attn.lr_out.weight, model.blocks[0].attn.to_out.weight)
    assert model.init_control() is model
    assert torch.equal(model.blocks[0].attn.lr_out.weight, model.blocks[0].attn.to_out.weight)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs()).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(model.control_parameters()) and any("lr_out" in name for name in moved)


@pytest.mark.parametrize("change,word", [
    (dict(sample=(2, 4, 7, 8), cond=(2, 4, 7, 8)), "nearest sizes are 6x8 and 8x8"),
    (dict(sample=(2, 4, 34, 8), cond=(2, 4, 34, 8)), "places up to 32x32"), (dict(cond=(2, 4, 4, 4)), "two latents of one shape"),
    (dict(sample=(2, 3, 8, 8), cond=(2, 3, 8, 8)), "with 4 channels"), (dict(sample=(2, 4, 0, 8), cond=(2, 4, 0, 8)), "nearest sizes are 2x8"),
    (dict(text=(2, 5, 13)), r"expected \[2, tokens, 12\]"), (dict(text=(1, 5, 12)), r"encoder_hidden_states has shape \[1, 5, 12\]"),
    (dict(text=None), "encoder_hidden_states is missing"), (dict(pooled=None), "pooled_projections is missing"),
    (dict(pooled=(2, 9)), r"expected \[2, 10\]"), (dict(pooled=(2, 1, 10)), "pooled_projections has shape")])
def test_bad_input(change, word):
    names = ("sample", "timestep", "cond", "text", "pooled")
    values = dict(zip(names, inputs())) | {k: None if v is None else torch.zeros(v) for k, v in change.items()}
    with pytest.raises(ConfigError, match=word): network()(*(values[name] for name in names))


@pytest.mark.parametrize("change,word", [
    (dict(caption_projection_dim=20), "all streams have one width"), (dict(version="r2"), "expected 'v1' or 'r1'"),
    (dict(lr_injection="add"), "lr_injection is 'add'"), (dict(num_layer=3), "Did you mean 'num_layers'"),
    (dict(attention_head_dim=3, caption_projection_dim=6), "multiple of 4"),
    (dict(places="learned"), "expected 'waves' or 'stored'")])
def test_bad_configuration(change, word):
    with pytest.raises(ConfigError, match=word): DIT4SR.from_config(OFFICIAL | change)


# --- official names and files

def test_counts():
    "On the meta device, where nothing is allocated."
    model = build("dit4sr", device="meta")
    ours = sum(p.numel() for p in model.parameters())
    new = sum(p.numel() for p in model.trainable_parameters())
    unused = sum(torch.Size(shape).numel() for shape in DIT4SR.unused(model).values())
    assert (ours + unused, ours - new, new, unused) == (2_716_814_144, 2_243_171_520, 350_877_696, 122_764_928)
    assert len(model.control_parameters()) == 344 and len(DIT4SR.unused(model)) == 130
    dead_in_v1 = sum(p.numel() for name, p in model.control_parameters().items() if ".lr_k." in name)
    assert dead_in_v1 == 87_350_784 and not list(model.buffers())


@torch.no_grad()
def test_files(tmp_path):
    "One file, a folder of shards with an index, with and without what is never read; back and forth."
    model, args = network(), inputs()
    expected, weights = model(*args), official_weights(model)
    save_file(weights, tmp_path / "one.safetensors")
    shards = tmp_path / "transformer"
    shards.mkdir()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {key: names[i % 2] for i, key in enumerate(weights)}
    for name in names: save_file({key: weights[key] for key in weights if index[key] == name}, shards / name)
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (shards / "config.json").write_text(json.dumps(OFFICIAL | {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0"}))
    config = json.loads((shards / "config.json").read_text())
    for source in (weights, tmp_path / "one.safetensors", shards, official_weights(model, unused=False, table=False)):
        assert torch.equal(load_official("dit4sr", source, config)(*args), expected)
    report = checkpoint_report("dit4sr", weights, config)
    assert report.fits and len(report.unused) == 10 and "10 in the file, dropped" in str(report)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(DiT4SR.from_pretrained(tmp_path / "ours").eval()(*args), expected)
    with pytest.raises(CheckpointError, match="DiT4SR.from_pretrained"):
        load_official("dit4sr", tmp_path / "ours", config)


def test_strictness():
    "The table is compared, a rounded one passes; strangers and wrong shapes are named."
    model = network()
    weights = official_weights(model)
    assert checkpoint_report("dit4sr", {k: v.bfloat16() for k, v in weights.items()}, OFFICIAL).fits
    for change, word in ((dict(**{"pos_embed.pos_embed": weights["pos_embed.pos_embed"].flip(1)}), "not those that the configuration"),
                         ({"transformer_blocks.0.attn2.add_q_proj.weight": torch.zeros(2, 2)}, "expected (16, 16)"),
                         ({"transformer_blocks.1.attn2.to_q.weight": torch.zeros(16, 16)}, "left over"),
                         ({"transformer_blocks.0.attn.to_q_control.bias": torch.full((16,), torch.nan)}, "NaN")):
        report = checkpoint_report("dit4sr", weights | change, OFFICIAL)
        assert not report.fits and word in str(report)
    lacking = {key: value for key, value in weights.items() if "control" not in key}
    with pytest.raises(CheckpointError, match="missing"): load_official("dit4sr", lacking, OFFICIAL)


@torch.no_grad()
def test_a_stored_table():
    "A file may bring places that our formula does not give."
    model, args = network(), inputs(4, 6)
    weights = official_weights(model)
    stored = OFFICIAL | dict(places="stored")
    torch.testing.assert_close(load_official("dit4sr", weights, stored)(*args), model(*args), atol=1e-5, rtol=1e-5)
    fresh = DIT4SR.from_config(stored)
    torch.testing.assert_close(fresh.patch_embed.table, weights["pos_embed.pos_embed"], atol=1e-6, rtol=0)
    weights["pos_embed.pos_embed"] = torch.randn(1, 256, 16)
    with pytest.raises(CheckpointError, match="places='stored'"): load_official("dit4sr", weights, OFFICIAL)
    other = load_official("dit4sr", weights, stored)
    assert (other(*args) - model(*args)).abs().max() > 1e-2
    assert torch.equal(official_state(DIT4SR, other)["pos_embed.pos_embed"], weights["pos_embed.pos_embed"])
    del weights["pos_embed.pos_embed"]
    with pytest.raises(CheckpointError, match="missing"): load_official("dit4sr", weights, stored)


@torch.no_grad()
def test_merging():
    "Base and additions from two files; the base alone gives the start of training."
    model, args = network(), inputs()
    weights = official_weights(model, unused=False)
    control = {key: value for key, value in weights.items() if "control" in key}
    base = {key: value for key, value in weights.items() if "control" not in key}
    assert torch.equal(load_official("dit4sr", merge_dit4sr(base, control), OFFICIAL)(*args), model(*args))
    started = load_official("dit4sr", merge_dit4sr(base), OFFICIAL)
    assert torch.equal(started(*args), model.init_control()(*args))
    for a, b in ((base, weights), (weights, control)):
        with pytest.raises(CheckpointError, match="in the wrong file"): merge_dit4sr(a, b)
