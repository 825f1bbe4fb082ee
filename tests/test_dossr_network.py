"DoSSR's networks, the names of the authors' file, and the pipeline: with small networks and random weights."
import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dit_sr_kit.checkpoints import checkpoint_report, load_official, official_manifest
from dit_sr_kit.core import CheckpointError, ConfigError, MissingExtra, WeightsUnavailable, make_generator
from dit_sr_kit.dossr_pipeline import DoSSRPipeline, system_from_stable_diffusion
from dit_sr_kit.images import crop_to, pad_to_multiple, to_unit
from dit_sr_kit.models import DoSSRControlNet, DoSSRSystem, RRDBNet
from dit_sr_kit.models.dossr_system import PROMPT, PROMPT_TOKENS, TextTower, pad_tokens
from dit_sr_kit.official.common import Piece, official_state
from dit_sr_kit.official.dossr import DOSSR, dossr_buffers, dossr_from_config, dossr_key_map
from dit_sr_kit.presets import presets
from dit_sr_kit.schedulers import DoSSRScheduler
from tests.goldens import golden_folders

NETWORK = dict(sample_size=8, base_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,),
               attention_head_dim=16, cross_attention_dim=32)
# the same system in the authors' words; LR sides are padded to multiples of 2 * 4 / 4
TINY = {
    "unet_config": {"target": "model.cldm.ControlledUnetModel", "params": dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1],
        num_res_blocks=1, channel_mult=[1, 2], num_head_channels=16, use_spatial_transformer=True,
        use_linear_in_transformer=True, transformer_depth=1, context_dim=32, legacy=False)},
    "controlnet_config": dict(in_channels=4, hint_channels=4, model_channels=32, attention_resolutions=[1],
                              num_res_blocks=1, channel_mult=[1, 2], num_head_channels=16, context_dim=32),
    "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": dict(
        embed_dim=4, monitor="val/rec_loss", lossconfig={"target": "torch.nn.Identity"},
        ddconfig=dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32,
                      ch_mult=[1, 1, 2], num_res_blocks=1, attn_resolutions=[], dropout=0.0))},
    "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": dict(
        freeze=True, layer="penultimate", width=32, heads=2, layers=3)},
    "preprocess_config": {"target": "model.bsrnet.RRDBNet", "params": dict(
        num_in_ch=3, num_out_ch=3, num_feat=8, num_block=2, num_grow_ch=4)}}


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    system = dossr_from_config(TINY).eval()
    with torch.no_grad():  # zero convolutions would hide the control branch
        for p in system.parameters():
            if not p.any(): p.normal_(std=0.1)
    return system


@pytest.fixture()
def network():
    torch.manual_seed(0)
    return DoSSRControlNet(**NETWORK).eval().set_prompt_embeddings(torch.randn(1, 5, 32))


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"): return DoSSRSystem()


def count(module): return sum(p.numel() for p in module.parameters())


def latents(generator, size=(8, 12), batch=2):
    return [torch.randn(batch, 4, *size, generator=generator) for _ in range(2)]

# SHA-256 of the sorted lines "key shape" of the authors' whole state, and "their key, key in diffusers" of three parts
MANIFEST = "df9603e4686a38896b4ae95b150f23cb2d9282572b9facc48d1885029425dc0b"
CONVERTED = "0bc51d1af0183b7d1ae52a7d1fa3f238a71c25b47aa4fec8e6638346b7f0e3d2"


# the network

def test_zero_convolutions_leave_the_unet_alone(network):
    x, cond = latents(make_generator(1))
    text = network.prompt_embeddings.expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(network(x, 3, cond), network.unet(x, 3, text, return_dict=False)[0])
        assert torch.equal(network(x, 3, cond), network(x, torch.tensor([3, 3]), -cond))


def test_zero_convolutions_have_gradients(network):
    x, cond = latents(make_generator(1))
    network(x, 3, cond).square().mean().backward()
    assert all(p.grad is None for p in network.unet.parameters())
    zeros = [*network.control.controlnet_down_blocks, network.control.controlnet_mid_block]
    assert all(conv.weight.grad.abs().sum() > 0 and conv.weight.abs().sum() == 0 for conv in zeros)
    assert network.control.conv_in.weight.grad.abs().sum() == 0  # nothing gets through a zero yet
    with torch.no_grad():
        for p in network.trainable_parameters(): p -= 0.1 * p.grad
    network.control.zero_grad()
    network(x, 3, cond).square().mean().backward()
    assert network.control.conv_in.weight.grad.abs().sum() > 0


def test_thirteen_zero_convolutions(full):
    widths = [conv.out_channels for conv in full.network.control.controlnet_down_blocks]
    assert widths == [320] * 4 + [640] * 3 + [1280] * 5
    assert full.network.control.controlnet_mid_block.out_channels == 1280
    assert tuple(full.network.control.conv_in.weight.shape) == (320, 8, 3, 3)
    assert full.network.size_multiple == 8
    assert not any("cond_embedding" in key for key in full.network.state_dict())


def test_only_the_control_branch_is_trained(network, full):
    assert not any(p.requires_grad for p in network.unet.parameters())
    assert sum(p.numel() for p in network.trainable_parameters()) == count(network.control)
    trained = [key for key, p in full.named_parameters() if p.requires_grad]
    assert trained and all(key.startswith("network.control.") for key in trained)


def test_control_starts_as_the_encoder(network):
    network.init_control_from_unet()
    ours, theirs = network.control.state_dict(), network.unet.state_dict()
    shared = [key for key in ours if key in theirs and key != "conv_in.weight"]
    assert len(shared) > 20 and all(torch.equal(ours[key], theirs[key]) for key in shared)
    assert torch.equal(ours["conv_in.weight"][:, :4], theirs["conv_in.weight"])
    assert not ours["conv_in.weight"][:, 4:].any()
    left = set(ours) - set(shared) - {"conv_in.weight"}
    assert all(key.startswith("controlnet_") and not ours[key].any() for key in left)


def test_the_noisy_latent_comes_first(network):
    network.init_control_from_unet()
    torch.nn.init.ones_(network.control.controlnet_mid_block.weight)
    x, cond = latents(make_generator(1))
    with torch.no_grad():
        assert torch.equal(network(x, 3, cond), network(x, 3, -cond))  # the LR channels are zero
        network.control.conv_in.weight[:, 4:] = 0.1
        assert not torch.equal(network(x, 3, cond), network(x, 3, -cond))


def test_guidance(network):
    x, cond = latents(make_generator(1))
    text, other = torch.randn(2, 1, 5, 32, generator=make_generator(2)).unbind()
    with torch.no_grad():
        positive, negative = network(x, 3, cond, text), network(x, 3, cond, other)
        torch.testing.assert_close(network.guided(x, 3, cond, 2.5, text, other),
                                   negative + 2.5 * (positive - negative))
        calls = []
        hook = network.unet.register_forward_hook(lambda *args: calls.append(1))
        assert torch.equal(network.guided(x, 3, cond, 1.0, text), positive) and len(calls) == 1
        hook.remove()
        with pytest.raises(ConfigError, match="no negative text embedding"): network.guided(x, 3, cond, 2.0, text)


@pytest.mark.parametrize("size,nearest", [((7, 8), "6x8 and 8x8"), ((1, 2), "2x2 and 2x2"), ((8, 3), "8x2 and 8x4")])
def test_wrong_sizes_name_the_nearest(network, size, nearest):
    x, cond = latents(make_generator(0), size)
    with pytest.raises(ConfigError, match=nearest): network(x, 0, cond)


def test_errors_of_the_network(network):
    x, cond = latents(make_generator(0))
    with pytest.raises(ConfigError, match=r"expected \(2, 4, 8, 12\)"): network(x, 0, cond[..., :4])
    with pytest.raises(ConfigError, match="1, tokens, 32"): network.set_prompt_embeddings(torch.zeros(1, 5, 33))
    with pytest.raises(ConfigError, match="no text embedding"): network.set_prompt_embeddings(None)(x, 0, cond)
    with pytest.raises(ConfigError, match="multiple of 32"): DoSSRControlNet(**dict(NETWORK, base_channels=40))


def test_network_saves_and_loads(network, tmp_path):
    network.save_pretrained(tmp_path)
    again = DoSSRControlNet.from_pretrained(tmp_path)
    x, cond = latents(make_generator(1))
    with torch.no_grad():
        assert torch.equal(again(x, 3, cond, network.prompt_embeddings), network(x, 3, cond))
    assert not any(p.requires_grad for p in again.unet.parameters())


def test_float64(network):
    x, cond = (z.double() for z in latents(make_generator(1)))
    assert network.double()(x, 3, cond).dtype == torch.float64


# the pre-processor

def reference_rrdb(state, x, num_blocks):
    "Real-ESRGAN's generator, written out with the authors' names."
    conv = lambda name, x: F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
    lrelu = lambda x: F.leaky_relu(x, 0.2)
    first = body = conv("conv_first", x)
    for b in range(num_blocks):
        out = body
        for r in (1, 2, 3):
            name = f"body.{b}.rdb{r}"
            x1 = lrelu(conv(f"{name}.conv1", out))
            x2 = lrelu(conv(f"{name}.conv2", torch.cat((out, x1), 1)))
            x3 = lrelu(conv(f"{name}.conv3", torch.cat((out, x1, x2), 1)))
            x4 = lrelu(conv(f"{name}.conv4", torch.cat((out, x1, x2, x3), 1)))
            out = 0.2 * conv(f"{name}.conv5", torch.cat((out, x1, x2, x3, x4), 1)) + out
        body = 0.2 * out + body
    x = first + conv("conv_body", body)
    for name in ("conv_up1", "conv_up2"): x = lrelu(conv(name, x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    return conv("conv_last", lrelu(conv("conv_hr", x)))


def test_rrdbnet(system):
    state = {key.removeprefix("preprocess_model."): value for key, value in official_state(DOSSR, system).items()
             if key.startswith("preprocess_model.")}
    lr = torch.rand(2, 3, 5, 7, generator=make_generator(0))
    with torch.no_grad(): ours = system.preprocessor(lr)
    assert ours.shape == (2, 3, 20, 28)
    torch.testing.assert_close(ours, reference_rrdb(state, lr, 2))


def test_rrdbnet_size():
    with torch.device("meta"): net = RRDBNet()
    assert count(net) == 16_697_987 and len(net.state_dict()) == 702


# the text tower

def reference_text(state, tokens, heads, layers):
    "OpenCLIP's text tower up to the last block but one, with PyTorch's own attention."
    state = {key.removeprefix("cond_stage_model.model."): value for key, value in state.items()}
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])
    linear = lambda name, x: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    n, width = x.shape[1:]
    mask = torch.full((n, n), -torch.inf).triu(1)
    for i in range(layers - 1):
        name = f"transformer.resblocks.{i}"
        h = norm(f"{name}.ln_1", x).transpose(0, 1)
        h = F.multi_head_attention_forward(
            h, h, h, width, heads, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"],
            None, None, False, 0.0, state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"],
            training=False, need_weights=False, attn_mask=mask)[0].transpose(0, 1)
        x = x + h
        x = x + linear(f"{name}.mlp.c_proj", F.gelu(linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", x))))
    return norm("ln_final", x)


@pytest.mark.parametrize("prompt", PROMPT_TOKENS)
def test_text_tower(system, prompt):
    tokens = pad_tokens(PROMPT_TOKENS[prompt])
    expected = reference_text(official_state(DOSSR, system), tokens, 2, 3)
    torch.testing.assert_close(system.encode_prompt(prompt), expected, atol=2e-5, rtol=1e-5)


def test_prompt_tokens():
    assert pad_tokens((1, 2, 3), 5).tolist() == [[1, 2, 3, 0, 0]]
    assert pad_tokens(range(9), 5).tolist() == [[0, 1, 2, 3, 8]]
    simple = pytest.importorskip("clip.simple_tokenizer", reason="openai-clip holds the word list")
    tokenizer = simple.SimpleTokenizer()
    for prompt, tokens in PROMPT_TOKENS.items():
        assert tokens == (49406, *tokenizer.encode(prompt), 49407)


def test_other_prompts_need_a_tokenizer(system):
    with pytest.raises(ConfigError, match="set system.tokenizer"): system.encode_prompt("a cat")


def test_without_text(monkeypatch):
    with torch.device("meta"): bare = DoSSRSystem(NETWORK, text_config=False, preprocessor_config=False)
    with pytest.raises(ConfigError, match="text_config=False"): bare.encode_prompt("")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"dit_sr_kit\[text\]"): TextTower()


# the authors' file

def digest(lines): return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def manifest_file(name):
    for folder in golden_folders():
        path = folder / "manifests" / "dossr" / name
        if path.is_file(): return json.loads(path.read_text())


def test_full_size(full):
    sizes = {"network.unet": 865_910_724, "network.control": 363_153_280, "vae": 83_653_863,
             "cond_encoder": 34_163_664, "text": 354_032_641, "preprocessor": 16_697_987}
    assert {name: count(full.get_submodule(name)) for name in sizes} == sizes
    assert count(full) == 1_717_612_159
    assert count(full) - full.text.projection.numel() == 1_716_563_583  # what the paper rounds to 1716.6 M


def test_manifest(full):
    state = official_state(DOSSR, full)
    ours = {key: tuple(value.shape) for key, value in (state | dossr_buffers(full)).items()}
    assert len(ours) == 2377 and sum(value.numel() for value in state.values()) == 1_717_612_159
    assert ours == official_manifest("dossr", {})
    lines = [f"{key} {list(shape)}" for key, shape in ours.items()]
    assert digest(lines) == MANIFEST
    if "dossr" in presets(): assert ours == official_manifest("dossr", "dossr")
    if (listed := manifest_file("dossr_cldm.json")) is not None:
        assert ours == {key: tuple(row[0]) for group in listed["keys"].values() for key, row in group.items()}


def test_names_agree_with_the_converters(full):
    "Every name of UNet, control branch and VAE, against what diffusers' own converters make of it."
    parts = dict(unet="network.unet.", controlnet="network.control.", vae="vae.")
    back = {theirs: ours for ours, theirs in dossr_key_map(full).items()}
    prefixes = {"model.diffusion_model.": "unet", "control_model.": "controlnet", "first_stage_model.": "vae"}
    pairs = {}
    for theirs, ours in back.items():
        part = next((part for prefix, part in prefixes.items() if theirs.startswith(prefix)), None)
        if part: pairs[theirs] = ours.removeprefix(parts[part])
    assert len(pairs) == 686 + 324 + 248
    assert digest(f"{theirs} {ours}" for theirs, ours in pairs.items()) == CONVERTED
    if (listed := manifest_file("dossr_diffusers_map.json")) is not None:
        assert pairs == (listed["unet"] | listed["controlnet"] | listed["vae"]
                         | listed["vae_reshaped_conv1x1_to_linear"])
    cond = {theirs.replace("cond_encoder.", "first_stage_model."): ours.replace("cond_encoder.", "vae.")
            for theirs, ours in back.items() if theirs.startswith("cond_encoder.")}
    assert len(cond) == 108 and all(back[theirs] == ours for theirs, ours in cond.items())


def test_round_trip(system, tmp_path):
    given = official_state(DOSSR, system)
    assert given["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (96, 32)
    assert given["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    buffers = {key: value.float() for key, value in dossr_buffers(system).items()}
    torch.save({"state_dict": {f"module.{key}": value for key, value in (given | buffers).items()}},
               tmp_path / "dossr.ckpt")
    for weights in (given, tmp_path / "dossr.ckpt"):
        loaded = load_official("dossr", weights, TINY)
        assert not loaded.training
        for (key, mine), other in zip(system.state_dict().items(), loaded.state_dict().values()):
            assert torch.equal(mine, other), key
        assert not any(p.requires_grad for p in loaded.network.unet.parameters())
    report = checkpoint_report("dossr", tmp_path / "dossr.ckpt", TINY)
    assert report.fits and len(report.buffers) == 15 and report.parameters == count(system)
    loaded.to("cpu")  # nothing is left without memory
    loaded.save_pretrained(tmp_path / "saved")  # no two tensors share memory
    with torch.no_grad(): torch.testing.assert_close(loaded.encode_prompt(""), system.encode_prompt(""))


def test_misfits(system):
    given = official_state(DOSSR, system)
    packed = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"
    for change, message in (({packed: torch.zeros(95)}, r"\(95,\), expected \(96,\)"),
                            ({"zero_convs.0.0.weight": torch.zeros(1)}, "left over"),
                            ({"lambdas": torch.linspace(0, 1, 1000)}, "lambdas: its values")):
        with pytest.raises(CheckpointError, match=message): load_official("dossr", given | change, TINY)
    given.pop(packed)
    with pytest.raises(CheckpointError, match=packed): load_official("dossr", given, TINY)


def test_pieces():
    whole = torch.arange(12.0).reshape(6, 2, 1, 1)
    piece = Piece(index=1, count=3, trailing=2)
    assert piece.official_shape((2, 2)) == (6, 2, 1, 1)
    assert piece.read(whole).tolist() == [[4, 5], [6, 7]]
    assert Piece().official_shape(()) == () and Piece().read(torch.tensor(2.0)) == 2


def test_released_configuration():
    "The whole model file in the authors' words is the default."
    config = {"target": "model.cldm.ControlLDM", "params": dict(
        linear_start=0.00085, linear_end=0.012, timesteps=1000, scale_factor=0.18215, channels=4, use_ema=False,
        log_every_t=200, beta_schedule="linear",
        unet_config=dict(model_channels=320, attention_resolutions=[4, 2, 1], channel_mult=[1, 2, 4, 4],
                         num_res_blocks=2, num_head_channels=64, context_dim=1024, use_checkpoint=True),
        control_stage_config={"target": "x", "params": dict(in_channels=4, hint_channels=4)},
        preprocess_config={"target": "x", "params": dict(num_feat=64, num_block=23, num_grow_ch=32, scale=4)})}
    assert official_manifest("dossr", config) == official_manifest("dossr", {})


@pytest.mark.parametrize("section,change,message", [
    ("unet_config", dict(legacy=True), "legacy is True"), ("unet_config", dict(chanel_mult=[1]), "channel_mult"),
    ("controlnet_config", dict(in_channels=9), "in_channels=9"),
    ("controlnet_config", dict(model_channels=64), "copy of the UNet"),
    ("first_stage_config", dict(embed_dim=3), "one number for both"),
    ("cond_stage_config", dict(layer="last"), "penultimate")])
def test_other_configurations_are_refused(section, change, message):
    old = TINY[section]
    inner = old.get("params", old) | change
    with pytest.raises(ConfigError, match=message): dossr_from_config(TINY | {section: inner})


# the pipeline

@pytest.fixture(scope="module")
def pipe(system): return DoSSRPipeline(system).to("cpu")


def test_five_steps_of_any_size(pipe):
    lr = torch.rand(1, 3, 9, 14, generator=make_generator(0))
    run = pipe(lr, record=True, progress=False)
    assert run.images[0].size == (56, 36)
    assert [record.timestep for record in run.trajectory] == [499, 399, 299, 200, 100]
    assert run.trajectory[0].sample.shape == (1, 4, 10, 14)  # 9 is padded to 10
    assert run.trajectory[0].sample_image.shape == (1, 3, 36, 56)
    assert run.trajectory.meta["seed"] == 42 and run.trajectory.meta["prompt"] == PROMPT
    assert run.images[0].tobytes() == pipe(lr, seed=42, progress=False).images[0].tobytes()
    assert run.images[0].tobytes() != pipe(lr, seed=1, progress=False).images[0].tobytes()


def by_hand(system, lr, seed, mode=False, guidance=1.0):
    "The chain without the pipeline."
    g, scheduler = make_generator(seed), DoSSRScheduler()
    image = system.preprocess(pad_to_multiple(lr, 2))
    control = system.cond_encoder.encode(2 * image - 1)
    cond = system.vae.encode(2 * image - 1, None if mode else g)
    scheduler.set_timesteps(5)
    x = scheduler.init_sample(cond, generator=g)
    for t in scheduler.timesteps:
        eps = system.network(x, t, control, system.encode_prompt(PROMPT))
        if guidance != 1:
            other = system.network(x, t, control, system.encode_prompt(""))
            eps = other + guidance * (eps - other)
        x = scheduler.step(eps, t, x, cond=cond, generator=g).prev_sample
    return crop_to(to_unit(system.vae.decode(x)), 4 * lr.shape[2], 4 * lr.shape[3]).clamp(0, 1)


@pytest.mark.parametrize("options", [dict(), dict(mode=True), dict(guidance=3.0)])
def test_pipeline_is_the_chain(pipe, system, options):
    lr = torch.rand(1, 3, 6, 7, generator=make_generator(3))
    call = dict(lr_posterior="mode" if options.get("mode") else "sample",
                guidance_scale=options.get("guidance", 1.0), color_fix=None)
    with torch.no_grad(): expected = by_hand(system, lr, 7, **options)
    run = pipe(lr, seed=7, record=True, progress=False, **call)
    torch.testing.assert_close(run.trajectory.result, expected, atol=1e-5, rtol=1e-5)


def test_colours_come_from_the_preprocessed_image(pipe, system):
    from dit_sr_kit.color import match_color
    lr = torch.rand(1, 3, 6, 7, generator=make_generator(3))
    plain = pipe(lr, color_fix=None, record=True, progress=False).trajectory.result
    fixed = pipe(lr, record=True, progress=False).trajectory.result
    with torch.no_grad(): image = crop_to(system.preprocess(pad_to_multiple(lr, 2)), 24, 28)
    torch.testing.assert_close(fixed, match_color(plain, image, "wavelet"))
    assert 0 <= image.min() and image.max() <= 1


def test_lists_tiles_and_generators(pipe):
    lr = torch.rand(2, 3, 8, 6, generator=make_generator(3))
    together = pipe(lr, 1, progress=False).images
    assert [one.tobytes() for one in together] == [pipe(x, 1, progress=False).images[0].tobytes() for x in lr]
    assert pipe(lr[0], 1, tile=4, progress=False).images[0].size == (24, 32)
    assert pipe(lr[0], 1, generator=make_generator(42), progress=False).images[0].tobytes() == together[0].tobytes()
    assert pipe.sample(lr, 1).shape == (2, 3, 32, 24)
    assert pipe.options["color_fix"] == "wavelet"


def test_errors_of_the_pipeline(pipe, network):
    lr = torch.rand(1, 3, 4, 4)
    with pytest.raises(ConfigError, match="colour fix"): pipe(lr, color_fix="hsv")
    with pytest.raises(ConfigError, match="lr_posterior"): pipe(lr, lr_posterior="mean")
    with pytest.raises(ConfigError, match="expected a DoSSRSystem"): DoSSRPipeline(network)
    with pytest.raises(ConfigError, match="not both"): pipe(lr, seed=1, generator=make_generator(1))


def test_pipeline_from_files(pipe, system, tmp_path):
    lr = torch.rand(1, 3, 4, 4, generator=make_generator(0))
    expected = pipe(lr, 2, progress=False).images[0].tobytes()
    official = DoSSRPipeline.from_official(official_state(DOSSR, system), TINY, device="cpu")
    assert official(lr, 2, progress=False).images[0].tobytes() == expected
    pipe.save_pretrained(tmp_path)
    again = DoSSRPipeline.from_pretrained(str(tmp_path), device="cpu")
    assert again(lr, 2, progress=False).images[0].tobytes() == expected
    other = pipe.with_process(solver_order=1)
    assert other.scheduler.config.solver_order == 1 and other.model is system


def test_nothing_is_downloaded_unasked():
    with pytest.raises(WeightsUnavailable, match=r"5 GB.*Open RAIL\+\+-M.*download=True"):
        DoSSRPipeline.from_stable_diffusion()


def test_from_stable_diffusion(system, tmp_path):
    "A folder in diffusers' layout, with the parts of the small system."
    system.network.unet.save_pretrained(tmp_path / "unet")
    system.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "text_encoder").mkdir()
    save_file({f"text_model.{key}": value for key, value in system.text.tower.state_dict().items()},
              tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(dict(
        vocab_size=49408, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=128,
        max_position_embeddings=77)))
    start = system_from_stable_diffusion(tmp_path)
    x, cond = latents(make_generator(0))
    text = start.encode_prompt("").expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(text[:1], system.encode_prompt(""))
        assert torch.equal(start(x, 3, cond, text), system.network.unet(x, 3, text, return_dict=False)[0])
        image = torch.rand(1, 3, 16, 16)
        assert torch.equal(start.control_latent(image), start.lr_latent(image))
        assert start.preprocess(torch.rand(1, 3, 4, 4)).shape == (1, 3, 16, 16)
    assert torch.equal(start.network.control.conv_in.weight[:, :4], system.network.unet.conv_in.weight)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no .safetensors"): system_from_stable_diffusion(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json cannot be read"): system_from_stable_diffusion(tmp_path)
