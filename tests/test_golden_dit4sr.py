"DiT4SR against stored results of the official code (weights and inputs are seeded random numbers)."
import hashlib
import json

import pytest
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from dit_sr_kit.checkpoints import load_official, official_manifest
from dit_sr_kit.color import adain, wavelet_split
from dit_sr_kit.dit4sr_pipeline import DiT4SRPipeline
from dit_sr_kit.latent_tiles import released_weights
from dit_sr_kit.official.common import official_state
from dit_sr_kit.official.dit4sr import DIT4SR, merge_dit4sr, sd35_medium_config
from dit_sr_kit.prompts import filter_sentences
from dit_sr_kit.tiling import tile_starts
from tests.goldens import golden_folders

# the short one lies in the repository; the others hold every intermediate value
FIXTURES = ["a_short", "a_dual_rms", "b_single_nonorm", "c_single_rms_large"]
OUTPUT, PROBABILITY = 1e-4, 5e-5
INPUTS = ("hidden_states", "timestep", "controlnet_image", "encoder_hidden_states", "pooled_projections")
VARIANTS = {"A": dict(lr_integration=False), "B": dict(lr_residual=False), "C": dict(lr_injection=None),
            "D": dict(lr_injection="linear")}


class Fixture:
    "One fixture: header, weights, inputs, results."

    def __init__(self, golden, name):
        self.name, (_, self.about) = name, golden("dit4sr", name)
        self.weights, self.io = golden("dit4sr", f"{name}.weights")[0], golden("dit4sr", f"{name}.io")[0]
        self.inputs = [self.io[f"in.{key}"] for key in INPUTS]

    def model(self, weights=None, **changes):
        return load_official("dit4sr", self.weights if weights is None else weights, self.about["config"] | changes)

    def base(self):
        "The weights of plain Stable Diffusion 3."
        theirs = SD3Transformer2DModel(**self.about["config"])
        return {key: self.weights[key] for key in theirs.state_dict()}


@pytest.fixture(params=FIXTURES)
def fixture(request, golden):
    return Fixture(golden, request.param)


@pytest.fixture
def check(golden_report):
    return lambda fixture, quantity, got, want, tolerance=OUTPUT: golden_report.check(
        f"dit4sr {fixture.name}", quantity, got, want, tolerance)


@pytest.mark.parametrize("version", ["v1", "r1"])
@torch.no_grad()
def test_output(fixture, check, version):
    model = fixture.model(version=version)
    check(fixture, f"{version} output", model(*fixture.inputs), fixture.io[f"{version}.output"])
    in_double = [value.double() for value in fixture.inputs]
    check(fixture, f"{version} output in float64", model.double()(*in_double).float(), fixture.io[f"{version}.output"])


@pytest.mark.parametrize("version", ["v1", "r1"])
@torch.no_grad()
def test_inside(fixture, check, version):
    "Embeddings, streams after every block, what enters and leaves the parts of block 0, attention maps."
    model, seen = fixture.model(version=version), {}
    keep = lambda name: lambda module, args, out: seen.update({name: (args, out)})
    for i, block in enumerate(model.blocks):
        for part in ("attn", "attn2", "ff"):
            if getattr(block, part) is not None: getattr(block, part).register_forward_hook(keep(f"block{i}.{part}"))
        block.register_forward_hook(keep(f"block{i}"))
    model.time_text_embed.register_forward_hook(keep("temb"))
    model.blocks[0].ff.net[0].register_forward_hook(keep("act"))
    model.blocks[0].ff.net[2].register_forward_hook(keep("injected"))
    model(*fixture.inputs)

    (joint, text, *_), _ = seen["block0"]
    ours = {"embed.x": joint.chunk(2, 1)[0], "embed.l": joint.chunk(2, 1)[1], "embed.c": text, "embed.temb": seen["temb"][1],
            "block0.ff_in": seen["block0.ff"][0][0], "block0.ff_out": seen["block0.ff"][1],
            "block0.ff_act": seen["act"][1], "block0.ff_injected": seen["injected"][0][0],
            "block0.attn_out_c": seen["block0.attn"][1][1]}
    for i, block in enumerate(model.blocks):
        hidden_states, text = seen[f"block{i}"][1]
        ours |= {f"block{i}.x_out": hidden_states.chunk(2, 1)[0], f"block{i}.l_out": hidden_states.chunk(2, 1)[1]}
        if text is not None: ours[f"block{i}.c_out"] = text
        for part in ("attn", "attn2"):
            if f"block{i}.{part}" not in seen: continue
            layer, (args, out) = getattr(block, part), seen[f"block{i}.{part}"]
            ours[f"block{i}.{part}_probs"] = layer.attention_weights(*args, chunk=7)
            torch.testing.assert_close(layer.attention_weights(*args, head_mean=True), ours[f"block{i}.{part}_probs"].mean(1))
            if i: continue
            ours |= {f"block0.norm1_{part}": args[0], f"block0.{part}_out_xl": out[0]}
            ours |= {f"block0.{part}_{name}": value for name, value in zip("qkv", layer.project(*args))}
    stored = {key.removeprefix(f"{version}."): value for key, value in fixture.io.items() if key.startswith(f"{version}.")}
    compared = stored.keys() - {"output"}
    assert compared <= ours.keys(), f"nothing to compare with: {sorted(compared - ours.keys())}"
    for key in sorted(compared):
        check(fixture, f"{version} {key}", ours[key], stored[key], PROBABILITY if key.endswith("probs") else OUTPUT)


@torch.no_grad()
def test_base(fixture, check):
    "Without LR integration and injection the noise stream is plain SD3; diffusers computes it independently."
    base = fixture.base()
    theirs = SD3Transformer2DModel(**fixture.about["config"])
    theirs.load_state_dict(base)
    sample, timestep, _, text, pooled = fixture.inputs
    result = theirs.eval()(sample, text, pooled, timestep, return_dict=False)[0]
    check(fixture, "diffusers' SD3 against the stored base", result, fixture.io["base_sd3.output"])
    for weights, changes in ((merge_dit4sr(base), {}), (fixture.weights, dict(lr_injection=None))):
        alone = fixture.model(weights, lr_integration=False, **changes)
        check(fixture, "base SD3", alone(*fixture.inputs), fixture.io["base_sd3.output"])
        check(fixture, "ours against diffusers' SD3", alone(*fixture.inputs), result)


@pytest.mark.parametrize("version", ["v1", "r1"])
@torch.no_grad()
def test_start_of_training(fixture, check, version):
    "Three ways to the same start: merged weights, `init_control` after loading, and the stored result."
    merged = fixture.model(merge_dit4sr(fixture.base()), version=version)
    reset = fixture.model(version=version).init_control()
    for quantity, model in (("merged", merged), ("init_control", reset)):
        check(fixture, f"{version} start, {quantity}", model(*fixture.inputs), fixture.io[f"init_{version}.output"])
    # no word of the LR stream reaches the noise yet: neither another LR image nor a random `lr_out` changes the answer
    random, inputs = fixture.model(version=version).init_control(copy_out=False), list(fixture.inputs)
    inputs[2] = torch.zeros_like(inputs[2])
    assert not torch.equal(random.blocks[0].attn.lr_out.weight, reset.blocks[0].attn.lr_out.weight)
    check(fixture, f"{version} start, random outputs, no LR image", random(*inputs), fixture.io[f"init_{version}.output"])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_ablations(fixture, check, variant):
    if f"variant_{variant}.output" not in fixture.io: pytest.skip("the short fixture has no weights for it")
    prefix = f"variant_{variant}."
    more = {key.removeprefix(prefix): value for key, value in fixture.io.items() if key.startswith(prefix + "transformer")}
    model = fixture.model(fixture.weights | more, **VARIANTS[variant])
    check(fixture, f"ablation {variant}", model(*fixture.inputs), fixture.io[prefix + "output"])


def test_dead_parameters(fixture):
    "Which tensors get no gradient, as the reference found it."
    for version in ("v1", "r1"):
        model = fixture.model(version=version)
        model(*fixture.inputs).square().mean().backward()
        last = f"transformer_blocks.{len(model.blocks) - 1}"
        dead = {DIT4SR.key_map(model)[name] for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        named = {key.replace(f"{last}.", "block_last.") if key.startswith(last) else key.split(".", 2)[2] for key in dead}
        listed = {key for key in fixture.about["checks"][f"zero_grad_{version}"]}
        never_built = {key for key in listed if key.startswith(("attn2.add_", "attn2.norm_added", "attn2.to_add_out"))}
        assert named == listed - never_built


@pytest.mark.parametrize("name,weights", [("t_short", "a_short"), ("t_train_step", "a_dual_rms")])
@pytest.mark.parametrize("version", ["v1", "r1"])
def test_training_step(golden, check, name, weights, version):
    fixture = Fixture(golden, weights)
    g, about = golden("dit4sr", f"{name}.io")[0], golden("dit4sr", name)[1]
    fixture.name = name
    model = fixture.model(version=version).freeze_base()
    sigma = g["sigma"].reshape(-1, 1, 1, 1)
    zt = (1 - sigma) * g["in.z0"] + sigma * g["in.noise"]
    check(fixture, "zt", zt, g["zt"])
    v = model(zt, g["timestep"], *fixture.inputs[2:])
    x0 = zt - sigma * v
    loss = (x0 - g["in.z0"]).square().mean()
    for quantity, value in (("v", v), ("x0", x0), ("loss", loss)):
        check(fixture, f"{version} {quantity}", value.detach(), g[f"{version}.{quantity}"].reshape(value.shape))
    loss.backward()
    expected = about["checks"][version]
    assert len(model.trainable_parameters()) == expected["num_trainable_tensors"]
    assert sum(p.numel() for p in model.trainable_parameters()) == expected["num_trainable"]
    keys = DIT4SR.key_map(model)
    grads = {keys[name]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    none = {keys[name] for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert none == set(expected["none_grad"])
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    for key in [key for key in g if key.startswith(f"{version}.grad.")]:
        official = key.removeprefix(f"{version}.grad.")
        check(fixture, f"{version} gradient of {official}", grads[official], g[key], 1e-6)


def test_gradients_at_the_start(fixture):
    "Queries and outputs of the LR stream get none; the norm blows up that of the keys, in r1 alone."
    for version in ("v1", "r1"):
        model = fixture.model(version=version).init_control()
        model(*fixture.inputs).square().mean().backward()
        keys = DIT4SR.key_map(model)
        for kind, norm in fixture.about["checks"][f"init_gradnorm_{version}"].items():
            found = [p.grad for name, p in model.named_parameters() if kind in keys[name] and p.grad is not None]
            total = torch.stack([grad.norm() for grad in found]).norm().item() if found else 0.0
            assert (total == 0) == (norm == 0), (version, kind, total, norm)
            assert kind != "to_k_control" or norm < 1 or total > 10


MANIFEST = (1383, "e920b9dea3087aac49a7d8e1adab996a77a7787ea60648df6d207a1904dd8502")


def test_manifest():
    "Keys and shapes of the official state: by fingerprint, and key by key where the list is at hand."
    ours = official_manifest("dit4sr", "dit4sr")
    assert ours == official_manifest("dit4sr", sd35_medium_config(version="v1"))
    text = json.dumps({key: list(shape) for key, shape in ours.items()}, sort_keys=True)
    assert (len(ours), hashlib.sha256(text.encode()).hexdigest()) == MANIFEST
    for folder in [path for f in golden_folders() for path in (f, f.parent)]:
        for path in (folder / "manifests" / "dit4sr").glob("*.json"):
            listed = json.loads(path.read_text())
            assert ours == {entry["key"]: tuple(entry["shape"]) for entry in listed["entries"]}
            assert ours == official_manifest("dit4sr", listed["constructor_config"])
            unused = {entry["key"] for entry in listed["entries"] if entry["group"] == "unused_extra"}
            with torch.device("meta"): model = DIT4SR.from_config(listed["constructor_config"])
            assert unused == set(DIT4SR.unused(model))
            new = {entry["key"] for entry in listed["entries"] if entry["group"] == "dit4sr_trainable"}
            assert new == {DIT4SR.key_map(model)[name] for name in model.control_parameters()}


def test_the_way_back(fixture):
    "Our weights under the official names are the file's, less what is never read."
    model = fixture.model()
    state = official_state(DIT4SR, model)
    assert state.keys() | DIT4SR.unused(model).keys() | {"pos_embed.pos_embed"} == fixture.weights.keys()
    assert all(torch.equal(value, fixture.weights[key]) for key, value in state.items())


# the pipeline

class Codes:
    "In place of an autoencoder: the fixtures hold latents."
    latent_channels, factor = 16, 4
    def to(self, *args): return self


@pytest.mark.parametrize("name", ["p1_pipeline_untiled_r1", "p2_pipeline_tiled_v1", "p3_pipeline_lrstart_r1"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_pipeline(golden, golden_report, name, batch_size):
    "States after every step: guidance with two LR latents, tiles, both starts."
    g, about = golden("dit4sr", f"{name}.io")[0], golden("dit4sr", name)[1]
    calls = []
    model = load_official("dit4sr", golden("dit4sr", f"{name}.weights")[0], about["config"] | {"version": about["version"]})
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    pipe = DiT4SRPipeline(model, autoencoder=Codes())
    pipe.options = pipe.options.changed(
        encoder_hidden_states=g["in.prompt_embeds"], pooled_projections=g["in.pooled"],
        negative_encoder_hidden_states=g["in.negative_prompt_embeds"], negative_pooled_projections=g["in.negative_pooled"],
        guidance_scale=about["guidance_scale"], tile=about["latent_tiled_size"], overlap=about["latent_tiled_overlap"],
        start=about["start_point"], batch_size=batch_size)
    latents = (g["in.lr_latent_raw"] - about["vae_shift_factor"]) * about["vae_scaling_factor"]
    states = []
    out = pipe.denoise(latents[1:], about["num_inference_steps"], noise=g["in.noise"], negative_cond=latents[:1],
                       on_step=lambda index, timestep, sample, step: states.append(step.prev_sample))
    for quantity, ours, theirs in (("sigmas", pipe.scheduler.sigmas, g["sigmas"]), ("timesteps", pipe.scheduler.timesteps, g["timesteps"])):
        golden_report.check(f"dit4sr {name}", quantity, ours, theirs, 1e-6 * theirs.abs().max().item())
    for i, state in enumerate([*states, out]):
        expected = g["out.latents" if i == len(states) else f"out.step{i}"]
        quantity = "result" if i == len(states) else f"state {i}"
        golden_report.check(f"dit4sr {name}", quantity, state, expected, 1e-3 * expected.abs().max().item())
    assert sum(calls) == 2 * about["transformer_calls"]
    if batch_size == 1: assert len(calls) == about["transformer_calls"] and set(calls) == {2}


def test_tile_weights(golden, golden_report):
    for name, expected in golden("dit4sr", "tile_weights")[0].items():
        golden_report.check("dit4sr tile_weights", name, released_weights(*expected.shape), expected, 1e-12)


def test_tile_offsets(golden):
    for key, expected in golden("dit4sr", "tile_offsets")[1].items():
        size, tile, overlap = map(int, key.split("_"))
        assert tile_starts(size, tile, tile - overlap) == expected, key


def test_color_fix(golden, golden_report):
    g = golden("dit4sr", "color_fix")[0]
    golden_report.check("dit4sr color_fix", "adain", adain(g["content"], g["style"]), g["adain"], 1e-4)
    mixed = wavelet_split(g["content"])[0] + wavelet_split(g["style"])[1]
    golden_report.check("dit4sr color_fix", "wavelet", mixed, g["wavelet"], 1e-5)


def test_prompt_filter(golden):
    for example in golden("dit4sr", "prompt_filter")[1]:
        assert filter_sentences(example["in"]) == example["out"]
