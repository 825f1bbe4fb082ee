"The VQ autoencoder: parity with stored results, the search, gradients, against diffusers' VQModel, names, errors."
import hashlib
import json

import pytest
import torch
from torch import nn

from dit_sr_kit.checkpoints import checkpoint_report, load_official, official_manifest
from dit_sr_kit.core import CheckpointError, ConfigError, ImageError
from dit_sr_kit.models import VQAutoencoder
from dit_sr_kit.models import vq_autoencoder as vq
from dit_sr_kit.official.vqgan import VQGAN, vqgan_from_config, vqgan_key_map, vqgan_to_config
from dit_sr_kit.presets import preset
from tests.goldens import golden_folders

TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-9}
SMALL = dict(num_codes=16, base_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, sample_size=16)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(seed=0, **changes):
    "A small autoencoder whose every number is random."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VQAutoencoder(**dict(SMALL, **changes)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1: nn.init.normal_(parameter, 1.0 if parameter.shape[0] % 32 == 0 else 0.0, 0.1)
        nn.init.normal_(model.quantizer.codebook)
    return model


# ---------------------------------------------------------------- parity
def test_golden(golden, golden_report):
    g, about = golden("ditsr", "vqmodel")
    weights = {key[2:]: value for key, value in g.items() if key.startswith("w.")}
    model = load_official("vqgan", weights, about["config"])
    assert sum(p.numel() for p in model.parameters()) == about["n_params"]
    check = lambda what, got, want: golden_report.check("vqmodel", what, got, want, TOLERANCE[want.dtype])
    with torch.no_grad():
        check("z", model.encode(g["x"]), g["z"])
        codes, indices = model.quantize(g["z"])
        check("z_q", codes, g["z_q"])
        assert torch.equal(indices.flatten(), g["indices"]) and indices.unique().numel() == about["codes_used"]
        check("dec", model.decode(g["z"]), g["dec"])
        check("dec_no_quant", model.decode(g["z"], quantize=False), g["dec_no_quant"])
        check("whole", model(g["x"]), g["dec"])
        model.double()
        check("z", model.encode(g["x"].double()), g["z_f64"])
        check("dec", model.decode(g["z"].double()), g["dec_f64"])


def in_diffusers_words(model):
    "The same network as diffusers' `VQModel`, where that can say it: one depth for all levels, no outer attention."
    from diffusers import VQModel

    c = model.config
    twin = VQModel(
        down_block_types=("DownEncoderBlock2D",) * len(c.channel_mult), up_block_types=("UpDecoderBlock2D",) * len(c.channel_mult),
        block_out_channels=tuple(c.base_channels * m for m in c.channel_mult), layers_per_block=c.num_res_blocks,
        latent_channels=c.feature_channels or c.latent_channels, vq_embed_dim=c.latent_channels, num_vq_embeddings=c.num_codes)
    words = {"quantizer.codebook": "quantize.embedding.weight", "levels.": "blocks.", "middle.0": "mid_block.resnets.0",
             "middle.1": "mid_block.attentions.0", "middle.2": "mid_block.resnets.1", "norm_out": "conv_norm_out",
             ".shortcut": ".conv_shortcut", "attentions.0.norm": "attentions.0.group_norm", "to_out": "to_out.0"}
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in words.items(): key = key.replace(ours, theirs)
        if key.startswith("encoder.blocks"):
            key = key.replace("encoder.blocks", "encoder.down_blocks").replace("resample", "downsamplers.0")
        if key.startswith("decoder.blocks"):
            key = key.replace("decoder.blocks", "decoder.up_blocks").replace("resample", "upsamplers.0")
        key = key.replace(".blocks.", ".resnets.")
        if "attentions.0.to_" in key and value.dim() == 4: value = value[..., 0, 0]  # 1 x 1 convolutions as linear layers
        state[key] = value
    twin.load_state_dict(state)
    return twin.eval()


@pytest.mark.parametrize("changes", [{}, dict(channel_mult=(1, 2), num_res_blocks=2, latent_channels=4, feature_channels=6)])
def test_equal_to_diffusers(changes):
    model = small(**changes).double()
    twin, x = in_diffusers_words(model).double(), randn(2, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        z = model.encode(x)
        torch.testing.assert_close(z, twin.encode(x).latents, rtol=0, atol=1e-10)
        torch.testing.assert_close(model.decode(z), twin.decode(z).sample, rtol=0, atol=1e-10)
        torch.testing.assert_close(model.decode(z, quantize=False), twin.decode(z, force_not_quantize=True).sample, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- the codebook
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_search_finds_the_nearest_code(dtype, monkeypatch):
    vectors, codebook = randn(300, 3).to(dtype), randn(50, 3, seed=1).to(dtype)
    exact = (vectors.double()[:, None] - codebook.double()).square().sum(-1)
    found = vq.nearest_codes(vectors, codebook)
    assert found.dtype == torch.int64
    torch.testing.assert_close(exact.gather(1, found[:, None])[:, 0], exact.amin(1), rtol=1e-5, atol=1e-6)
    for budget in (1, 50, 777):  # a chunk of one vector, of one, of fifteen
        monkeypatch.setattr(vq, "SEARCH_BUDGET", budget)
        assert torch.equal(vq.nearest_codes(vectors, codebook), found)


def test_search_far_from_the_origin():
    "Distances of nearly equal codes far away: |z|^2 is left out, so its rounding cannot hide them."
    codebook = torch.tensor([[100.0, 0, 0], [100.01, 0, 0], [100.02, 0, 0]])
    assert vq.nearest_codes(torch.tensor([[100.011, 0, 0], [100.019, 0, 0]]).double(), codebook.double()).tolist() == [1, 2]


def test_search_under_autocast():
    vectors, codebook = randn(200, 3), randn(64, 3, seed=1)
    plain = vq.nearest_codes(vectors, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(vq.nearest_codes(vectors, codebook), plain)


def test_quantize():
    model, z = small(), randn(2, 3, 4, 6)
    with torch.no_grad(): codes, indices = model.quantize(z)
    assert codes.shape == z.shape and indices.shape == (2, 4, 6)
    assert torch.equal(codes[1, :, 2, 3], model.quantizer.codebook[indices[1, 2, 3]])
    with torch.no_grad(): again, same = model.quantize(codes)
    assert torch.equal(again, codes) and torch.equal(same, indices)  # a code is its own nearest code
    assert torch.equal(model.quantizer.lookup(indices), codes)


def test_gradients_pass_straight_through():
    model, z = small(), randn(1, 3, 4, 4).requires_grad_()
    codes, indices = model.quantize(z)
    weight = randn(1, 3, 4, 4, seed=1)
    gradient, = torch.autograd.grad((codes * weight).sum(), z)
    assert torch.equal(gradient, weight)  # the identity's
    with torch.no_grad(): torch.testing.assert_close(codes, model.quantize(z)[0])
    model.quantizer.lookup(indices).square().sum().backward()
    assert model.quantizer.codebook.grad.abs().sum() > 0
    loss = model(randn(1, 3, 16, 16)).square().mean()
    loss.backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0, "the encoder learns through the codebook"


# ---------------------------------------------------------------- shapes, saving
def test_shapes_and_names():
    model = small(latent_channels=5, feature_channels=7)
    x = randn(2, 3, 8, 12)
    with torch.no_grad():
        z = model.encode(x)
        assert (model.factor, model.latent_channels) == (4, 5) and z.shape == (2, 5, 2, 3)
        assert model.decode(z).shape == x.shape and model(x).shape == x.shape


def test_attention_at_levels():
    model = small(sample_size=16, attention_resolutions=(8,))
    assert [len(level.attention) for level in model.encoder.levels] == [0, 1, 0]
    assert [len(level.attention) for level in model.decoder.levels] == [0, 2, 0]
    with torch.no_grad(): assert model(randn(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    assert {"encoder.down.1.attn.0.q.weight", "decoder.up.1.attn.1.proj_out.bias"} <= set(vqgan_key_map(model).values())


def test_saving_and_loading(tmp_path):
    model, x = small(num_res_blocks=(1, 2, 1)), randn(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    again = VQAutoencoder.from_pretrained(tmp_path)
    with torch.no_grad(): assert torch.equal(again(x), model(x))


def test_errors_say_what_to_do():
    model = small()
    with pytest.raises(ImageError, match="10x16.*multiples of 4.*pad_to_multiple"): model.encode(torch.zeros(1, 3, 10, 16))
    with pytest.raises(ImageError, match="8 channels.*3"): model.decode(torch.zeros(1, 8, 4, 4))
    with pytest.raises(ConfigError, match="2 entries for 3 levels"): VQAutoencoder(num_res_blocks=(1, 2))
    with pytest.raises(ConfigError, match="48.*multiple of 32"): VQAutoencoder(base_channels=48)


# ---------------------------------------------------------------- official names
F4 = {"embed_dim": 3, "n_embed": 8192, "ddconfig": {
    "double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "padding_mode": "zeros"}}
F8 = {"embed_dim": 8, "n_embed": 4096, "ddconfig": dict(
    F4["ddconfig"], z_channels=8, resolution=512, ch=64, ch_mult=[1, 2, 4, 8], num_res_blocks=[1, 2, 3, 4])}
MANIFESTS = {  # configuration, preset, keys, parameters, factor, SHA-256 of the sorted {key: shape} as JSON
    "vqgan_f4": (F4, "dit-sr", 205, 55_322_782, 4, "a7472e459cd9e054aa0513658895b2fe906539017faccbd9ba3d4a4a99421c89"),
    "vqgan_f8_face": (F8, "dit-sr-face", 285, 77_009_115, 8, "4fc6d43c87bb47f394cff557065e3e09a5cbecd0ca9a79c39e05f6e62fb39873"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest(name):
    config, row, count, parameters, factor, fingerprint = MANIFESTS[name]
    ours = official_manifest("vqgan", config)
    for folder in [path for f in golden_folders() for path in (f, f.parent)]:
        path = folder / "manifests" / "ditsr" / f"{name}.json"
        if path.exists():
            listed = json.loads(path.read_text())
            assert ours == {key: tuple(shape) for key, shape, *_ in listed["keys"]}
            assert config == listed["constructor_params"]
    text = json.dumps({key: list(shape) for key, shape in ours.items()}, sort_keys=True)
    assert len(ours) == count and hashlib.sha256(text.encode()).hexdigest() == fingerprint
    with torch.device("meta"): model = vqgan_from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters and model.factor == factor
    assert set(vqgan_key_map(model)) == set(model.state_dict())
    from_preset = vqgan_to_config(preset(row).autoencoder_config)  # and back again
    assert official_manifest("vqgan", from_preset) == ours


def official_state(model):
    return {theirs: model.state_dict()[ours] for ours, theirs in vqgan_key_map(model).items()}


def test_round_trip_of_names():
    model, x = small(channel_mult=(1, 2), num_res_blocks=(1, 2), feature_channels=4), randn(1, 3, 8, 8)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    again = load_official("vqgan", {"state_dict": official_state(model)}, vqgan_to_config(config))
    with torch.no_grad(): assert torch.equal(again(x), model(x))


def test_the_keys_of_the_training_loss_are_ignored_and_reported():
    model = small()
    config = vqgan_to_config(SMALL)
    extra = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
    report = checkpoint_report("vqgan", official_state(model) | extra, config)
    assert report.fits and set(report.ignored) == set(extra)
    load_official("vqgan", official_state(model) | extra, config)
    for stray in ("lossy.weight", "model_ema.decay", "encoder.loss.weight"):
        with pytest.raises(CheckpointError, match=stray):
            load_official("vqgan", official_state(model) | {stray: torch.zeros(1)}, config)


def test_configurations_that_mean_another_network():
    for changes, word in [(dict(double_z=True), "double_z"), (dict(padding_mode="reflect"), "padding_mode"),
                          (dict(ch_mul=[1]), "ch_mult"), (dict(num_res_blocks=[1]), "num_res_blocks")]:
        with pytest.raises(ConfigError, match=word): vqgan_from_config(F4 | {"ddconfig": F4["ddconfig"] | changes})
    with pytest.raises(ConfigError, match="ddconfig"): vqgan_from_config({"embed_dim": 3, "n_embed": 8})
    with pytest.raises(ConfigError, match="n_embed"): vqgan_from_config(F4 | {"n_embeds": 8})
    assert VQGAN.ignored == ("loss.",)
