"The pipeline of DiT4SR, its tiles, guidance and prompts: small networks, random weights."
import json
import warnings

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from dit_sr_kit.checkpoints import load_official
from dit_sr_kit.color import match_color
from dit_sr_kit.core import CheckpointError, ConfigError, DitSrError, WeightsUnavailable, make_generator
from dit_sr_kit.dit4sr_pipeline import DiT4SROptions, DiT4SRPipeline
from dit_sr_kit.images import crop_to, pad_to_multiple, resize, to_signed, to_unit
from dit_sr_kit.latent_tiles import guided_velocity, in_tiles, released_weights
from dit_sr_kit.models import DiT4SR
from dit_sr_kit.models.autoencoders import SpaceToDepth
from dit_sr_kit.models.kl_autoencoder import KLAutoencoder
from dit_sr_kit.official.common import official_state
from dit_sr_kit.official.dit4sr import DIT4SR, dit4sr_unused, sd35_medium_config, version_of
from dit_sr_kit.pipelines import SRPipeline
from dit_sr_kit.prompts import (NEGATIVE_PROMPT, POSITIVE_SUFFIX, SD3TextEncoder, complete_prompt, filter_sentences,
                                read_prompts)
from dit_sr_kit.schedulers import FlowMatchScheduler

NETWORK = dict(sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
               joint_attention_dim=40, caption_projection_dim=16, pooled_projection_dim=28, pos_embed_max_size=12,
               dual_attention_layers=[0], qk_norm="rms_norm")
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
           layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=1.5305, shift_factor=0.0609,
           use_quant_conv=False, use_post_quant_conv=False)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = load_official_start()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=0.15)
    return model


def load_official_start():
    from dit_sr_kit.official.dit4sr import dit4sr_from_config
    return dit4sr_from_config(NETWORK).eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return KLAutoencoder(**VAE).eval()


@pytest.fixture(scope="module")
def words():
    "Text and negative text, as options."
    g = make_generator(5)
    return dict(encoder_hidden_states=torch.randn(1, 5, 40, generator=g), pooled_projections=torch.randn(1, 28, generator=g),
                negative_encoder_hidden_states=torch.randn(1, 5, 40, generator=g),
                negative_pooled_projections=torch.randn(1, 28, generator=g))


@pytest.fixture
def pipe(network, vae, words):
    pipe = DiT4SRPipeline(network, autoencoder=vae)
    pipe.options = pipe.options.changed(**words, guidance_scale=1.0)
    return pipe


def picture(height=5, width=6, seed=0, batch=1): return torch.rand(batch, 3, height, width, generator=make_generator(seed))


# guidance and tiles

def test_guidance():
    model = lambda x, t, cond, text, pooled: x + 2 * cond + text.mean((1, 2))[:, None, None, None] + pooled.sum()
    x, cond, other = (picture(4, 4, seed) for seed in range(3))
    text, negative = (torch.ones(1, 2, 3), torch.zeros(1, 4)), (torch.zeros(1, 2, 3), torch.zeros(1, 4))
    assert torch.equal(guided_velocity(model, x, 5.0, cond, text), x + 2 * cond + 1)
    torch.testing.assert_close(guided_velocity(model, x, 5.0, cond, text, negative, 3.0), x + 2 * cond + 3)
    expected = x + 2 * other + 3.0 * (2 * cond + 1 - 2 * other)
    torch.testing.assert_close(guided_velocity(model, x, 5.0, cond, text, negative, 3.0, other), expected)


@pytest.mark.parametrize("blend", ["released", "gaussian", "uniform"])
@pytest.mark.parametrize("size,tile,overlap,count", [((8, 8), 8, 3, 1), ((6, 8), 8, 3, 1), ((12, 16), 8, 2, 6), ((6, 20), 8, 3, 4),
                                                     ((9, 8), 8, 7, 2)])
def test_tiles(size, tile, overlap, count, blend):
    z, y = picture(*size, batch=2), picture(*size, seed=1, batch=2)
    for batch_size in (1, 4):
        calls = []
        def network(z, y):
            calls.append(len(z))
            assert z.shape[2:] == tuple(min(side, tile) for side in size)
            return z - 2 * y
        torch.testing.assert_close(in_tiles(network, (z, y), tile, overlap, batch_size, blend), z - 2 * y)
        assert sum(calls) == 2 * count and len(calls) == -(-count // batch_size)


def test_weights_of_a_tile():
    w = released_weights(6, 8)
    torch.testing.assert_close(w, w.flip(1))
    assert not torch.allclose(w, w.flip(0)) and torch.allclose(w[1:], w[1:].flip(0))  # peak in row 3 of 0..5, in place of 2.5
    assert w.dtype == torch.float64 and (w > 0).all()
    low = in_tiles(lambda z: z, (torch.ones(1, 1, 12, 8, dtype=torch.bfloat16),), 8, 2)
    assert low.dtype == torch.float32 and torch.allclose(low, torch.ones(()), atol=1e-2)


# the pipeline

def by_hand(pipe, lr, seed, steps, words, guidance=1.0, posterior="sample", tile=8):
    "The chain without the pipeline, for pictures that fit into a tile."
    g, scheduler, vae = make_generator(seed), FlowMatchScheduler(), pipe.autoencoder
    image = resize(pad_to_multiple(lr, 1), scale=4)
    encode = lambda: vae.encode(to_signed(image), None if posterior == "mode" else g)
    conds = [encode(), encode()] if posterior == "each" and guidance > 1 else [encode()] * 2
    x = torch.randn(conds[0].shape, generator=g)
    scheduler.set_timesteps(steps)
    text, pooled, no_text, no_pooled = words.values()
    for t, sigma, following in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:]):
        v = pipe.model(x, t, conds[1], text, pooled)
        if guidance > 1:
            away = pipe.model(x, t, conds[0], no_text, no_pooled)
            v = away + guidance * (v - away)
        x = x + (following - sigma) * v
    sr = crop_to(to_unit(vae.decode(x)), 4 * lr.shape[2], 4 * lr.shape[3]).clamp(0, 1)
    return sr, image.clamp(0, 1)


@pytest.mark.parametrize("guidance,posterior", [(1.0, "sample"), (4.0, "sample"), (4.0, "each"), (4.0, "mode"), (1.0, "each")])
@torch.no_grad()
def test_pipeline_is_the_chain(pipe, words, guidance, posterior):
    lr = picture(4, 4)
    sr, image = by_hand(pipe, lr, 7, 3, words, guidance, posterior)
    for fix, expected in ((None, sr), ("adain", match_color(sr, image, "adain")), ("wavelet", match_color(sr, image, "wavelet"))):
        run = pipe(lr, 3, seed=7, record=True, progress=False, guidance_scale=guidance, lr_posterior=posterior, color_fix=fix)
        torch.testing.assert_close(run.trajectory.result, expected, atol=2e-5, rtol=1e-4)
    assert run.trajectory.meta["guidance_scale"] == guidance and run.trajectory.meta["lr_posterior"] == posterior
    assert pipe.options.lr_posterior == "sample" and pipe.options.guidance_scale == 1.0


def test_defaults_are_the_released_ones(network, vae):
    options, pipe = DiT4SROptions(), DiT4SRPipeline(network, autoencoder=vae)
    assert (options.color_fix, options.start, options.blend, options.max_sequence_length) == ("adain", "noise", "released", 256)
    assert pipe.guidance_scale == 1.0  # no negative text to lead away from
    pipe.text_encoder = object()
    assert pipe.guidance_scale == 8.0
    pipe.scheduler.set_timesteps()
    assert len(pipe.scheduler.timesteps) == 40 and pipe.scheduler.config.shift == 3.0
    assert pipe._tile() == (8, 3)
    with torch.device("meta"): full = DiT4SR()
    big = DiT4SRPipeline(full, autoencoder=type("VAE", (SpaceToDepth,), dict(latent_channels=16, factor=8))())
    assert big._tile() == (64, 24) and big.lr_multiple == 4
    big.options = options.changed(tile=128, overlap=48)
    assert big._tile() == (64, 24)


def test_any_size_in_tiles(pipe):
    lr = picture(7, 9)
    run = pipe(lr, 2, seed=0, record=True, progress=False)
    assert run.images[0].size == (36, 28) and run.trajectory[0].sample.shape == (1, 4, 14, 18)
    assert run.trajectory[0].sample_image.shape == run.trajectory.result.shape == (1, 3, 28, 36)
    assert [float(record.timestep) for record in run.trajectory] == pipe.scheduler.timesteps.tolist()
    steps = []
    together = pipe(lr, 2, seed=0, progress=False, batch_size=5, on_step=steps.append)
    assert len(steps) == 2 and together.images[0].tobytes() == run.images[0].tobytes()
    other = pipe(lr, 2, seed=0, progress=False, blend="gaussian").images[0]
    assert other.tobytes() != run.images[0].tobytes()
    whole = pipe(lr, 2, seed=0, progress=False, tile=12, record=True).trajectory
    assert (whole.result - run.trajectory.result).abs().max() > 1e-3 and whole[0].sample.shape == (1, 4, 14, 18)
    same = pipe(lr, 2, seed=0, progress=False, start="lr").images[0]  # sigma starts at 1
    assert same.tobytes() == run.images[0].tobytes()
    auto = pipe(lr, 2, seed=0, progress=False, tile="auto").images[0]
    assert auto.tobytes() == run.images[0].tobytes()


def test_small_images(pipe):
    tiny = picture(2, 3)
    run = pipe(tiny, 1, seed=0, record=True, progress=False)
    assert run.trajectory[0].sample.shape == (1, 4, 8, 12)  # sides 2 and 3 become 4 and 6, the tile's and 1.5 of it
    assert run.trajectory.result.shape == run.trajectory[0].sample_image.shape == (1, 3, 8, 12)
    plain = pipe(tiny, 1, seed=0, record=True, progress=False, enlarge_small=False)
    assert plain.trajectory[0].sample.shape == (1, 4, 4, 6) and plain.images[0].size == (12, 8)


def test_lists_and_prompts(pipe, monkeypatch):
    asked = []

    class Reader:
        device = torch.device("cpu")
        def encode(self, prompt, length):
            asked.append((prompt, length))
            g = make_generator(len(prompt))
            return torch.randn(1, 3, 40, generator=g), torch.randn(1, 28, generator=g)

    pipe.text_encoder, pipe.options = Reader(), DiT4SROptions()
    lrs = picture(4, 4, batch=2)
    out = pipe(lrs, 1, seed=0, progress=False, prompt=["A fox.", "A harbour at night."], max_sequence_length=77)
    assert asked == [(f"A fox. {POSITIVE_SUFFIX}", 77), (NEGATIVE_PROMPT, 77), (f"A harbour at night. {POSITIVE_SUFFIX}", 77),
                     (NEGATIVE_PROMPT, 77)]
    one = pipe(lrs[1], 1, seed=0, progress=False, prompt="A harbour at night.", max_sequence_length=77)
    assert one.images[0].tobytes() == out.images[1].tobytes()
    run = pipe(lrs[0], 1, seed=0, progress=False, record=True, prompt="", added_prompt="", guidance_scale=1)
    assert asked[-1] == ("", 256) and run.trajectory.meta["negative_prompt"] == NEGATIVE_PROMPT
    json.dumps(run.trajectory.meta)
    with pytest.raises(ConfigError, match="2 prompts for 1 images"): pipe(lrs[0], 1, prompt=["a", "b"])
    g = make_generator(0)
    streams = pipe(list(lrs), 1, generator=g, progress=False, prompt="x").images
    assert streams[0].tobytes() != streams[1].tobytes() and pipe.options == DiT4SROptions()


def test_batches_of_equal_size(pipe, words):
    lr = picture(6, 5, batch=2)
    pipe.options = pipe.options.changed(lr_posterior="mode")
    sr = pipe.sample(lr, 1, make_generator(0))
    assert sr.shape == (2, 3, 24, 20)
    pipe.options = pipe.options.changed(**{key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in words.items()})
    torch.testing.assert_close(pipe.sample(lr, 1, make_generator(0)), sr)
    pipe.options = pipe.options.changed(encoder_hidden_states=torch.zeros(3, 5, 40), pooled_projections=torch.zeros(3, 28))
    with pytest.raises(ConfigError, match="3 texts for a batch of 2"): pipe.sample(lr, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(pipe, dtype):
    import copy
    lr = picture(6, 5)
    expected = pipe(lr, 2, seed=0, record=True, progress=False, lr_posterior="mode").trajectory.result
    twin = DiT4SRPipeline(copy.deepcopy(pipe.model).to(dtype), autoencoder=copy.deepcopy(pipe.autoencoder).to(dtype))
    twin.options = pipe.options
    found = twin(lr, 2, seed=0, record=True, progress=False, lr_posterior="mode").trajectory
    assert (found.result - expected).abs().max() < (1e-4 if dtype == torch.float64 else 0.2)
    assert found[0].sample.dtype in (torch.float32, torch.float64)


def test_bad_input(pipe, network, vae, words):
    lr, silent = picture(4, 4), DiT4SRPipeline(network, autoencoder=vae)
    text, pooled = words["encoder_hidden_states"], words["pooled_projections"]
    for call, message in [
            (lambda: silent(lr), "no text: this pipeline has no text encoder.*as encoder_hidden_states"),
            (lambda: silent(lr, encoder_hidden_states=text), "pooled_projections is missing"),
            (lambda: silent(lr, pooled_projections=pooled), "encoder_hidden_states is missing"),
            (lambda: silent(lr, encoder_hidden_states=text, pooled_projections=pooled, guidance_scale=3),
             "no negative text.*as negative_encoder_hidden_states.*guidance_scale=1"),
            (lambda: silent(lr, encoder_hidden_states=text[..., :7], pooled_projections=pooled), r"expected \[1, tokens, 40\]"),
            (lambda: silent(lr, encoder_hidden_states=text, pooled_projections=pooled[:, :7]), r"expected \[1, 28\]"),
            (lambda: pipe(lr, guidance_scale=2, negative_encoder_hidden_states=text[:, :2]), "one max_sequence_length"),
            (lambda: pipe.denoise(torch.zeros(1, 4, 8, 8), 1, noise=torch.zeros(1, 4, 8, 6)), "noise"),
            (lambda: pipe.denoise(torch.zeros(1, 3, 8, 8), 1), "latent"),
            (lambda: pipe(lr, prompts="a fox"), "Did you mean 'prompt'"),
            (lambda: pipe(lr, guidance_scale=0.5), "at least 1"), (lambda: pipe(lr, start="image"), "'noise' or 'lr'"),
            (lambda: pipe(lr, lr_posterior="mean"), "lr_posterior"), (lambda: pipe(lr, color_fix="hsv"), "color_fix"),
            (lambda: pipe(lr, tile=0), "tile is 0"), (lambda: pipe(lr, tile=4, overlap=4), "less than the tile"),
            (lambda: pipe(lr, batch_size=0), "batch_size"), (lambda: pipe(lr, blend="round"), "blend"),
            (lambda: pipe(lr, seed=1, generator=make_generator(1)), "not both"),
            (lambda: DiT4SRPipeline(vae), "expected a DiT4SR"), (lambda: DiT4SRPipeline(network), "no autoencoder"),
            (lambda: DiT4SRPipeline(network, autoencoder=SpaceToDepth(4)), "48 channels")]:
        with pytest.raises(DitSrError, match=message): call()
    pipe.options = pipe.options.changed(guidance_scale=2.0)
    with pytest.raises(ConfigError, match="expected one shape"):
        pipe.denoise(torch.zeros(1, 4, 8, 8), 1, negative_cond=torch.zeros(1, 4, 8, 6))


# files

def test_saved_pipeline(network, vae, words, tmp_path):
    import copy
    model = copy.deepcopy(network).set_prompt_embeddings(words["encoder_hidden_states"][0], words["pooled_projections"][0])
    pipe, lr = DiT4SRPipeline(model, autoencoder=vae, name="mine"), picture(5, 7)
    expected = pipe(lr, 2, seed=0, progress=False).images[0].tobytes()
    pipe.save_pretrained(tmp_path)
    for kind in (SRPipeline, DiT4SRPipeline):
        again = kind.from_pretrained(str(tmp_path), device="cpu")
        assert type(again) is DiT4SRPipeline and again.name == "mine"
        assert again(lr, 2, seed=0, progress=False).images[0].tobytes() == expected
    shifted = again.with_process(shift=1.0)
    assert type(shifted) is DiT4SRPipeline and shifted.scheduler.config.shift == 1.0
    (tmp_path / "prompt.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="prompt.safetensors"): SRPipeline.from_pretrained(str(tmp_path))
    pipe.model.set_prompt_embeddings(None)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "prompt.safetensors").exists()
    assert SRPipeline.from_pretrained(str(tmp_path), device="cpu").model.prompt is None


def test_preset_with_a_stored_text(network, words, monkeypatch):
    import dit_sr_kit.pipelines as module
    from dit_sr_kit.presets import Preset
    config = {key: value for key, value in network.config.items() if not key.startswith("_")} | dict(in_channels=48, out_channels=48)
    row = Preset("a trial", DiT4SR, config, dict(shift=3.0), "SpaceToDepth", dict(patch_size=4), weights="trial",
                 process=FlowMatchScheduler)
    torch.manual_seed(0)
    weights = {key: value.detach().clone() for key, value in DiT4SR(**config).state_dict().items()}
    prompt = {"prompt.encoder_hidden_states": words["encoder_hidden_states"][0], "prompt.pooled_projections": words["pooled_projections"][0]}
    monkeypatch.setattr(module, "preset", lambda name: row)
    monkeypatch.setattr(module, "build", lambda name: DiT4SR(**config).eval())
    monkeypatch.setattr(module, "bundled_weights", lambda name: weights | prompt)
    pipe = SRPipeline.from_preset("trial", device="cpu")
    assert type(pipe) is DiT4SRPipeline and pipe._tile() == (8, 3) and pipe.lr_multiple == 2
    run = pipe.restore_known(torch.rand(1, 3, 40, 36, generator=make_generator(0)), steps=2)
    assert run.result.shape == (1, 3, 40, 36) and run.meta["guidance_scale"] == 1.0
    monkeypatch.setattr(module, "bundled_weights", lambda name: weights | {"prompt.pooled_projections": torch.zeros(28)})
    with pytest.raises(CheckpointError, match="a stored text is"): SRPipeline.from_preset("trial", device="cpu")


def official_folder(model, folder):
    "A folder as the authors have it, in two shards."
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    weights = official_state(DIT4SR, model) | {key: torch.randn(shape) for key, shape in dit4sr_unused(model).items()}
    names = list(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({key: weights[key].detach().contiguous() for key in part}, folder / f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {key: f"part-{i}.safetensors" for i, part in enumerate((names[::2], names[1::2])) for key in part}}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"} | NETWORK))


def test_from_official(network, vae, words, tmp_path):
    vae.save_pretrained(tmp_path / "sd" / "vae")
    official_folder(network, tmp_path / "dit4sr_q" / "transformer")
    official_folder(network, tmp_path / "other" / "transformer")
    lr = picture(5, 4)
    pictures = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version, pipe in {"v1": DiT4SRPipeline.from_official(tmp_path / "dit4sr_q", tmp_path / "sd", device="cpu"),
                              "r1": DiT4SRPipeline.from_official(tmp_path / "other", tmp_path / "sd" / "vae", version="r1", device="cpu")
                              }.items():
            assert pipe.model.config.version == version
            pictures[version] = pipe(lr, 2, seed=0, progress=False, **words).images[0].tobytes()
    assert pictures["v1"] != pictures["r1"]
    with pytest.warns(UserWarning, match="v1 and r1 alike.*built as r1"):
        DiT4SRPipeline.from_official(tmp_path / "other", vae, device="cpu")
    with pytest.warns(UserWarning, match="stands for version v1.*built as r1"):
        DiT4SRPipeline.from_official(tmp_path / "dit4sr_q", vae, version="r1", device="cpu")
    with pytest.raises(WeightsUnavailable, match="acceptee/DiT4SR.*Pi-Lab.*non-commercial.*Stability AI"):
        DiT4SRPipeline.from_official(tmp_path / "dit4sr_f", vae)
    mapping = official_state(DIT4SR, network)
    with pytest.warns(UserWarning, match="nothing names the version"): load_official("dit4sr", mapping, NETWORK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_official("dit4sr", mapping, NETWORK | {"version": "r1"})
    assert [version_of(x) for x in ("a/dit4sr_f/x", "dit4sr_q.safetensors", "DiT4SR_R1/transformer", "dit4sr", None, {})] == [
        "v1", "v1", "r1", None, None, None]


def test_nothing_is_downloaded_unasked():
    message = r"16 GB.*transformer 4.9.*t5 9.5.*Stability AI Community License.*gated.*Pi-Lab License 1.0, for non-commercial.*download=True"
    with pytest.raises(WeightsUnavailable, match=message): DiT4SRPipeline.from_stable_diffusion()
    with pytest.raises(WeightsUnavailable, match="about 5 GB"): DiT4SRPipeline.from_stable_diffusion(text_parts=())


def text_encoders(folder, widths=(16, 12), token_dim=40):
    "Three small text encoders with letters for words, in Stable Diffusion 3's layout."
    from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast)
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    torch.manual_seed(2)
    for i, width in enumerate(widths):
        end = "" if i == 0 else "_2"
        tokenizer = folder / f"tokenizer{end}"
        tokenizer.mkdir(parents=True)
        (tokenizer / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
        (tokenizer / "merges.txt").write_text("#version: 0.2\n")
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(
            dict(model_max_length=77, tokenizer_class="CLIPTokenizer") | (dict(pad_token="a") if i else {})))
        CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53)).save_pretrained(folder / f"text_encoder{end}")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)] + [(letter, -2.0) for letter in letters]
    T5TokenizerFast(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer_3")
    T5EncoderModel(T5Config(vocab_size=30, d_model=token_dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(
        folder / "text_encoder_3")


def test_from_stable_diffusion(words, tmp_path):
    "End to end through a folder that diffusers and transformers wrote: full structure, tiny sizes."
    pytest.importorskip("transformers")
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    torch.manual_seed(0)
    base = SD3Transformer2DModel(**NETWORK | dict(in_channels=16, out_channels=16, num_layers=3, dual_attention_layers=[0, 1]))
    vae = AutoencoderKL(**VAE | dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                                     block_out_channels=(8,) * 4, latent_channels=16))
    base.save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    text_encoders(tmp_path)
    pipe = DiT4SRPipeline.from_stable_diffusion(str(tmp_path), device="cpu")
    assert pipe.name == "dit4sr-start" and pipe.guidance_scale == 8.0 and pipe.lr_multiple == 4 and pipe._tile() == (8, 3)
    assert not pipe.model.blocks[0].attn.lr_q.weight.any()
    assert torch.equal(pipe.model.blocks[1].attn2.lr_out.weight, base.transformer_blocks[1].attn2.to_out[0].weight)

    encoder = pipe.text_encoder
    reference = StableDiffusion3Pipeline(
        transformer=None, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=encoder.clip_l[1],
        tokenizer=encoder.clip_l[0], text_encoder_2=encoder.clip_g[1], tokenizer_2=encoder.clip_g[0], text_encoder_3=encoder.t5[1],
        tokenizer_3=encoder.t5[0])
    for prompt, length in (("a red fox", 256), ("", 77), ("many words " * 40, 77)):
        hidden, _, pooled, _ = reference.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False,
                                                       max_sequence_length=length)
        ours = encoder.encode(prompt, length)
        assert ours[0].shape == (1, 77 + length, 40)
        torch.testing.assert_close(ours, (hidden, pooled))

    lr = picture(18, 14)
    run = pipe(lr, 2, seed=0, progress=False, record=True, prompt="a red fox", max_sequence_length=77)
    assert run.images[0].size == (56, 72) and run.trajectory[0].sample.shape == (1, 16, 12, 8)  # 14 is enlarged to the tile's 16
    assert run.trajectory.meta["prompt"] == "a red fox" and run.trajectory.result.std() > 0
    # the light path gives the same picture
    text, negative = (encoder.encode(prompt, 77) for prompt in (complete_prompt("a red fox"), NEGATIVE_PROMPT))
    light = DiT4SRPipeline.from_stable_diffusion(str(tmp_path), text_parts=(), device="cpu")
    assert light.text_encoder is None
    again = light(lr, 2, seed=0, progress=False, guidance_scale=8.0, encoder_hidden_states=text[0], pooled_projections=text[1],
                  negative_encoder_hidden_states=negative[0], negative_pooled_projections=negative[1])
    assert again.images[0].tobytes() == run.images[0].tobytes()
    # with the additions of a training
    torch.manual_seed(3)
    control = {key: torch.randn_like(value) * 0.1 for key, value in official_state(DIT4SR, pipe.model).items() if "control" in key}
    with pytest.warns(UserWarning, match="nothing names the version"):
        DiT4SRPipeline.from_stable_diffusion(str(tmp_path), control, text_parts=(), device="cpu")
    trained = DiT4SRPipeline.from_stable_diffusion(str(tmp_path), control, version="v1", text_parts=["clip_l"], device="cpu")
    assert trained.model.config.version == "v1" and trained.name == "dit4sr"
    tokens, pooled = trained.text_encoder.encode("fox", 5)
    assert tokens.shape == (1, 82, 40) and not tokens[:, 77:].any() and not tokens[..., 16:].any() and not pooled[:, 16:].any()
    other = trained(lr, 1, seed=0, progress=False, prompt="fox", max_sequence_length=5)
    assert other.images[0].size == (56, 72)
    with pytest.raises(CheckpointError, match="'clip_g' is not in"):
        SD3TextEncoder.from_pretrained(tmp_path / "vae", ["clip_g"])
    with pytest.raises(ConfigError, match="no text encoder 'bert'"): SD3TextEncoder.from_pretrained(tmp_path, ["bert"])
    with pytest.raises(ConfigError, match="28 pooled numbers"): SD3TextEncoder.from_pretrained(
        tmp_path, ["clip_l", "clip_g"], token_dim=40, pooled_dim=30).encode("fox")
    with pytest.raises(ConfigError, match="T5 gives tokens of 40"): SD3TextEncoder.from_pretrained(
        tmp_path, ["t5"], token_dim=48, pooled_dim=28).encode("fox")
    (tmp_path / "transformer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json' cannot be read|config.json cannot be read"):
        DiT4SRPipeline.from_stable_diffusion(str(tmp_path), text_parts=(), device="cpu")


def test_no_text_encoder_at_all():
    tokens, pooled = SD3TextEncoder(token_dim=8, pooled_dim=6).encode("a fox", 4)
    assert tokens.shape == (1, 81, 8) and pooled.shape == (1, 6) and not tokens.any() and not pooled.any()


# prompts

@pytest.mark.parametrize("text,expected", [
    ("", ""), ("A fox. It is BLURRY! Really?", "A fox. Really?"), ("no end", "no end"), ("Depth of field. \n A cat", "A cat"),
    ("The man is positioned left. A dog.", "A dog."), ("In black and white. In colour.", "In colour.")])
def test_filter(text, expected):
    assert filter_sentences(text) == expected


def test_prompts_from_files(tmp_path):
    (tmp_path / "fox.txt").write_text("A fox\nin the  snow.\n")
    (tmp_path / "lines").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path, ["lr/fox.png"]) == ["A fox in the snow."]
    assert read_prompts(tmp_path / "lines", ["b.png", "a.png"]) == ["one", "two"]
    with pytest.raises(ConfigError, match="no prompt for 1 of 2.*cat.txt"): read_prompts(tmp_path, ["fox.png", "cat.png"])
    with pytest.raises(ConfigError, match="2 prompts for 1 pictures"): read_prompts(tmp_path / "lines", ["fox.png"])
    with pytest.raises(ConfigError, match="does not exist"): read_prompts(tmp_path / "none", [])
    assert complete_prompt("A fox.", "sharp") == "A fox. sharp" and complete_prompt("", "sharp") == "sharp"
