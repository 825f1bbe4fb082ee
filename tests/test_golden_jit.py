"JiT and JiT-SR against numbers of the released code."
import json
from functools import lru_cache

import pytest
import torch

from dit_sr_kit.checkpoints import OFFICIAL_SYSTEMS, load_official, official_manifest
from dit_sr_kit.core import CheckpointError
from dit_sr_kit.layers.embeddings import timestep_embedding
from dit_sr_kit.layers.jit_blocks import RMSNorm, SwiGLU, position_table, rotary_angles, rotate_pairs, unpatchify
from dit_sr_kit.losses import flow_times, velocity_loss
from dit_sr_kit.official.common import official_state
from dit_sr_kit.presets import build
from dit_sr_kit.schedulers import JiTFlowScheduler, convert_prediction
from dit_sr_kit.schedulers.flow import flow_to_vp, guide
from dit_sr_kit.schedulers.parametrisations import velocity_to_flow, velocity_to_vp, vp_to_flow
from tests.goldens import golden_folders

FORWARD, STATES, LOSS, EXACT = 2e-5, 1e-4, 1e-5, 1e-12
SIZES = dict(input_size=32, patch_size=8, hidden_size=48, depth=3, num_heads=3, bottleneck_dim=16)
JIT = dict(SIZES, num_classes=10, in_context_len=4, in_context_start=1)
JIT_SR = dict(SIZES, lr_size=8, lr_patch_size=2, lr_start=1)


def single(tensors):
    "Weights are stored in half precision, exactly."
    return {key: value.float() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def model(golden):
    return load_official("jit", single(golden("jit", "official_weights")[0]), JIT)


@pytest.fixture(scope="module")
def fork(golden):
    "The unconditional fork, with and without its gates."
    weights = single(golden("jit", "uncond_gated_weights")[0])
    plain = {key: value for key, value in weights.items() if "attn.gate" not in key}
    sizes = dict(SIZES, num_classes=0)
    return load_official("jit", weights, dict(sizes, gated=True)), load_official("jit", plain, sizes)


@pytest.fixture(scope="module")
def sr(golden):
    weights = single(golden("jit", "jitsr_weights")[0])
    return {how: load_official("jit-sr", weights, dict(JIT_SR, conditioning=how)) for how in ("token", "concat")}


def seen(module, call):
    "What a module returns while `call` runs."
    found = []
    handle = module.register_forward_hook(lambda m, inputs, output: found.append(output))
    with torch.no_grad(): call()
    handle.remove()
    return found[0]


# ---- parts -------------------------------------------------------------------------------------------------------

def test_modules(golden, golden_report, model):
    tensors, _ = golden("jit", "modules")
    check = lambda name, actual, expected: golden_report.check("jit modules", name, actual, expected, FORWARD)
    for side, key in ((3, "rope_half16_seq3_cls2"), (4, "rope_half8_seq4_cls0"), (4, "rope_half8_seq4_cls4")):
        prefix, head_dim = int(key[-1]), tensors[f"{key}.in"].shape[-1]
        angles = torch.cat([torch.zeros(prefix, head_dim // 2).double(), rotary_angles(side, side, head_dim)])
        check(f"{key}.cos", angles.cos().repeat_interleave(2, dim=1), tensors[f"{key}.cos"])
        check(f"{key}.sin", angles.sin().repeat_interleave(2, dim=1), tensors[f"{key}.sin"])
        check(f"{key}.out", rotate_pairs(tensors[f"{key}.in"], angles), tensors[f"{key}.out"])
    for size, side in ((16, 3), (48, 4)):
        check(f"pos_embed {size} {side}", position_table(side, side, size), tensors[f"pos_embed_D{size}_grid{side}"])
    check("temb", timestep_embedding(tensors["temb.t"], 256), tensors["temb.out256"])
    norm = RMSNorm(24)
    norm.load_state_dict({"weight": tensors["rms.weight"]})
    check("rms", norm(tensors["rms.in"]), tensors["rms.out"])
    check("rms bf16", norm(tensors["rms.in"].bfloat16()).float(), tensors["rms.out_bf16"])
    mlp = SwiGLU(20)
    names = {"w12": "proj_in", "w3": "proj_out"}
    mlp.load_state_dict({f"{ours}.{kind}": tensors[f"swiglu.{theirs}.{kind}"] for theirs, ours in names.items()
                         for kind in ("weight", "bias")})
    check("swiglu", mlp(tensors["swiglu.in"]), tensors["swiglu.out"])
    check("unpatchify", unpatchify(tensors["unpatchify.in"], 4, 8), tensors["unpatchify.out"])
    check("patchify", model.patch_embed(tensors["patchify.in"]), tensors["patchify.out"])


def test_parametrisations(golden, golden_report):
    tensors, _ = golden("jit", "parametrisations")
    x, e, t, alpha, sigma = (tensors[key] for key in ("x0", "eps", "t", "alpha", "sigma"))
    k, t_eps = tensors["noise_scale"].item(), tensors["t_eps"].item()
    check = lambda name, actual: golden_report.check("jit parametrisations", name, actual, tensors[name], EXACT)
    shaped = lambda value: value.squeeze(1)
    to = lambda value, src, dst, state, a, s, how: convert_prediction(value, src, dst, state, shaped(a), shaped(s), how)
    check("vp_xt", alpha * x + sigma * e)
    check("vp_v", to(x, "sample", "v_prediction", tensors["vp_xt"], alpha, sigma, "vp"))
    check("vp_v", to(e, "epsilon", "v_prediction", tensors["vp_xt"], alpha, sigma, "vp"))
    golden_report.check("jit parametrisations", "x0 from v", to(tensors["vp_v"], "v_prediction", "sample", tensors["vp_xt"],
                                                                alpha, sigma, "vp"), x, EXACT)
    scheduler = JiTFlowScheduler(noise_scale=k, t_eps=t_eps)
    check("flow_z", scheduler.add_noise(x, e, shaped(t), None))
    check("flow_v", to(x, "sample", "flow", tensors["flow_z"], t, 1 - t, "flow"))
    check("flow_v", to(k * e, "noise", "flow", tensors["flow_z"], t, 1 - t, "flow"))
    check("flow_v_clamped", scheduler.velocity(x, shaped(t), tensors["flow_z"]))
    a, s, R = flow_to_vp(t, k)
    check("map_alpha", a)
    check("map_sigma", s)
    check("map_vp_xt", tensors["flow_z"] / R)
    check("map_vp_v", to(x, "sample", "v_prediction", tensors["map_vp_xt"], a, s, "vp"))


WORLDS = {  # what the fixture calls the state, the weights and the three answers
    "vp": ("vp_xt", "alpha", "sigma", dict(sample="x0", epsilon="eps", v_prediction="vp_v")),
    "mapped": ("map_vp_xt", "map_alpha", "map_sigma", dict(sample="x0", epsilon="eps", v_prediction="map_vp_v")),
    "flow": ("flow_z", "t", None, dict(sample="x0", noise="eps", flow="flow_v")),
}


@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_of_answers(golden, golden_report, world):
    tensors, _ = golden("jit", "parametrisations")
    state, alpha, sigma, names = WORLDS[world]
    a = tensors[alpha].squeeze(1)
    s = 1 - a if sigma is None else tensors[sigma].squeeze(1)
    true = {kind: tensors[name] * (tensors["noise_scale"] if kind == "noise" else 1) for kind, name in names.items()}
    for src in true:
        for dst in true:
            found = convert_prediction(true[src], src, dst, tensors[state], a, s, "flow" if world == "flow" else "vp")
            golden_report.check(f"jit parametrisations, {world}", f"{src} -> {dst}", found, true[dst], EXACT)


def test_guard_and_maps(golden, golden_report):
    tensors, _ = golden("jit", "parametrisations")
    t, k, f = tensors["t"].squeeze(1), tensors["noise_scale"].item(), tensors["t_eps"].item()
    z, v, v_vp, x = (tensors[key] for key in ("flow_z", "flow_v", "map_vp_v", "x0"))
    check = lambda name, actual, expected: golden_report.check("jit parametrisations", name, actual, expected, EXACT)
    assert (1 - t < f).any() and (1 - t > f).any()
    check("guarded v", convert_prediction(x, "sample", "flow", z, t, 1 - t, "flow", floor=f), tensors["flow_v_clamped"])
    check("t of a VP state", vp_to_flow(tensors["map_alpha"], tensors["map_sigma"], k), tensors["t"])
    check("VP velocity", velocity_to_vp(v, z, t, k), v_vp)
    check("flow velocity", velocity_to_flow(v_vp, tensors["map_vp_xt"], t, k), v)


# ---- forwards ----------------------------------------------------------------------------------------------------

def test_official_forward(golden, golden_report, model):
    tensors, _ = golden("jit", "official_forward")
    call = lambda: model(tensors["x"], tensors["t"], tensors["y"])
    check = lambda name, actual: golden_report.check("jit official forward", name, actual, tensors[name], FORWARD)
    with torch.no_grad(): check("out", call())
    check("pos_embed", model.pos_embed)
    block = model.trunk.blocks[0]
    places = {"t_emb": model.time_embedding, "y_emb": model.class_embedding, "patch_tokens": model.patch_embed,
              "block0_norm1_out": block.norm1, "block0_adaln_out": block.modulation.linear, "block0_attn_out": block.attn,
              "block0_mlp_out": block.mlp, "final_tokens": model.trunk.proj_out,
              **{f"block{i}_out": model.trunk.blocks[i] for i in range(3)}}
    for name, module in places.items(): check(f"mid.{name}", seen(module, call).reshape(tensors[f"mid.{name}"].shape))
    check("mid.t_freq", timestep_embedding(tensors["t"], 256))


def test_unconditional_forward(golden, golden_report, fork):
    tensors, _ = golden("jit", "uncond_forward")
    with torch.no_grad():
        for name, network in zip(("out_gated", "out_plain"), fork):
            golden_report.check("jit unconditional", name, network(tensors["x"], tensors["t"]), tensors[name], FORWARD)


@pytest.mark.parametrize("how", ["token", "concat"])
def test_sr_forward(golden, golden_report, sr, how):
    tensors, _ = golden("jit", "jitsr_out")
    with torch.no_grad(): out = sr[how](tensors["hr_noisy"], tensors["t"], tensors["lr"])
    golden_report.check("jit-sr forward", f"{how}.out", out, tensors[f"{how}.out"], FORWARD)


@pytest.mark.parametrize("how", ["token", "concat"])
def test_inside_sr(golden, golden_report, sr, how):
    tensors, _ = golden("jit", "jitsr_forward")
    network, inputs = sr[how], (tensors["hr_noisy"], tensors["t"], tensors["lr"])
    check = lambda name, actual: golden_report.check("jit-sr forward", f"{how}.{name}", actual, tensors[f"{how}.{name}"], FORWARD)
    call = lambda: network(*inputs)
    tokens = "patch_tokens" if how == "token" else "patch_tokens_concat"
    for name, module in {"lr_tokens_before_pos": network.lr_embed, tokens: network.patch_embed,
                         "block0_out": network.trunk.blocks[0], "block2_out": network.trunk.blocks[2]}.items():
        check(f"mid.{name}", seen(module, call))


def test_sr_concat_takes_the_enlarged_picture(golden, golden_report, sr):
    from dit_sr_kit.images import resize
    tensors, _ = golden("jit", "jitsr_out")
    with torch.no_grad(): out = sr["concat"](tensors["hr_noisy"], tensors["t"], resize(tensors["lr"], scale=4))
    golden_report.check("jit-sr forward", "concat.out, LR enlarged", out, tensors["concat.out"], FORWARD)


# ---- training ----------------------------------------------------------------------------------------------------

def relative(report, fixture, name, actual, expected):
    report.check(fixture, f"{name}, relative", actual.double() / expected.double(), torch.ones_like(expected), LOSS)


def test_official_loss(golden, golden_report, model):
    (tensors, _), scheduler = golden("jit", "official_loss"), JiTFlowScheduler()
    check = lambda name, actual: golden_report.check("jit loss", name, actual, tensors[name], FORWARD)
    t = flow_times(2, normal=tensors["t_normal"])
    check("t", t)
    labels = torch.where(tensors["label_drop_uniform"] < 0.1, 10, tensors["labels"])
    assert torch.equal(labels, tensors["labels_used"])
    z = scheduler.add_noise(tensors["x_clean"], tensors["e_unscaled"], t)
    check("z", z)
    x_pred = model(z, t, labels)
    check("x_pred", x_pred.detach())
    for name, x in (("v", tensors["x_clean"]), ("v_pred", x_pred)):
        size = tensors[name].abs().max()
        golden_report.check("jit loss", f"{name}, relative", scheduler.velocity(x, t, z).detach() / size, tensors[name] / size, LOSS)
    loss, errors = velocity_loss(x_pred, tensors["x_clean"], z, t, scheduler)
    relative(golden_report, "jit loss", "loss_per_sample", errors.detach(), tensors["loss_per_sample"])
    relative(golden_report, "jit loss", "loss", loss.detach()[None], tensors["loss"])
    model.zero_grad()
    loss.backward()
    keys = {theirs: ours for ours, theirs in OFFICIAL_SYSTEMS["jit"].key_map(model).items()}
    grads = {theirs: dict(model.named_parameters())[ours].grad for theirs, ours in keys.items() if theirs != "net.pos_embed"}
    assert model.pos_embed.grad is None
    for name in [key for key in tensors if key.startswith("grad.")]:
        size = tensors[name].abs().max()
        actual = grads[name.removeprefix("grad.")].reshape(tensors[name].shape)
        golden_report.check("jit loss", f"{name}, relative", actual / size, tensors[name] / size, LOSS)
    norms = torch.stack([grads[name].norm() for name in header("grad_norm_names")])
    relative(golden_report, "jit loss", "grad_norms", norms, tensors["grad_norms"])
    model.zero_grad()


@lru_cache
def header(name):
    "An entry of the fixtures' configuration."
    for folder in golden_folders():
        if (folder / "jit" / "config.json").is_file(): return json.loads((folder / "jit" / "config.json").read_text())[name]
    pytest.skip("fixture jit/config is not here")


@pytest.mark.parametrize("how", ["token", "concat"])
def test_sr_loss(golden, golden_report, sr, how):
    (tensors, _), scheduler = golden("jit", "jitsr_forward"), JiTFlowScheduler()
    t, x = flow_times(2, normal=tensors["t_normal"]), tensors["hr_clean01"]
    z = scheduler.add_noise(x, tensors["e_unscaled"], t)
    with torch.no_grad(): loss, _ = velocity_loss(sr[how](z, t, tensors["lr"]), x, z, t, scheduler)
    relative(golden_report, "jit-sr loss", how, loss[None], tensors[f"{how}.loss"])


def test_moving_averages(golden, golden_report):
    "The rule of training, without its warm-up: e <- d e + (1 - d) p."
    tensors, _ = golden("jit", "ema")
    for name, decay in (("ema1", 0.9999), ("ema2", 0.9996)):
        average = tensors["p0"].clone()
        for k in (1, 2, 3):
            average.lerp_(tensors[f"p{k}"], 1 - decay)  # (TR-3)
            golden_report.check("jit ema", f"{name}_{k}", average, tensors[f"{name}_{k}"], 1e-6)


# ---- sampling ----------------------------------------------------------------------------------------------------

def states(scheduler, z, estimate):
    "The state at the beginning of every interval and at the end."
    found, corrected = [z], scheduler.config.method == "euler"
    for i, t in enumerate(scheduler.timesteps):
        z = scheduler.step(estimate(z, t), t, z).prev_sample
        if corrected or i % 2 or i == len(scheduler.timesteps) - 1: found.append(z)
    return torch.stack(found)


CASES = [("euler", 4, 1.0, (0.0, 1.0)), ("heun", 4, 1.0, (0.0, 1.0)), ("heun", 6, 2.4, (0.1, 1.0)), ("euler", 8, 3.0, (0.25, 0.75))]


@pytest.mark.parametrize("method,steps,scale,interval", CASES)
def test_official_sampler(golden, golden_report, model, method, steps, scale, interval):
    tensors, _ = golden("jit", "official_sampler")
    scheduler, y = JiTFlowScheduler(method=method), tensors["labels"]
    scheduler.set_timesteps(steps)
    start = scheduler.init_sample(tensors["init_noise_unscaled"], noise=tensors["init_noise_unscaled"])
    with torch.no_grad():
        found = states(scheduler, start, lambda z, t: guide(model(z, t, y), model(z, t), t, scale, interval))
    key = f"traj.{method}_N{steps}_cfg{scale:g}_i{interval[0]:g}-{interval[1]:g}"
    golden_report.check("jit sampler", key, found, tensors[key], STATES)


def test_official_sampler_behind_the_guard(golden, golden_report, model):
    tensors, _ = golden("jit", "official_sampler")
    scheduler = JiTFlowScheduler(default_steps=30)
    start = scheduler.init_sample(tensors["init_noise_unscaled"], noise=tensors["init_noise_unscaled"])
    with torch.no_grad(): found = states(scheduler, start, lambda z, t: model(z, t, tensors["labels"]))
    golden_report.check("jit sampler", "final.heun_N30_clamp", found[-1], tensors["final.heun_N30_clamp"], STATES)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sampling_from_the_middle(golden, golden_report, fork, method):
    tensors, _ = golden("jit", "uncond_forward")
    scheduler = JiTFlowScheduler(method=method)
    scheduler.set_timesteps(4, t_start=0.3)
    with torch.no_grad(): found = states(scheduler, tensors["denoise_z_start"], lambda z, t: fork[0](z, t))
    key = f"denoise_gated_{method}_t0.3_to_1_N4"
    golden_report.check("jit unconditional", key, found[-1], tensors[key], STATES)


@pytest.mark.parametrize("method,scale", [("euler", 1.0), ("heun", 1.0), ("heun", 1.5)])
def test_sr_sampler(golden, golden_report, sr, method, scale):
    "Published: no guidance at t = 0, and an LR picture of zeros in place of a condition."
    tensors, _ = golden("jit", "jitsr_forward")
    network, lr, scheduler = sr["token"], tensors["sampler.lr"], JiTFlowScheduler(method=method)
    scheduler.set_timesteps(4)
    start = scheduler.init_sample(tensors["sampler.init_noise_unscaled"], noise=tensors["sampler.init_noise_unscaled"])

    def estimate(z, t):
        with_lr, without = network(z, t, lr), network(z, t, torch.zeros_like(lr))
        return guide(with_lr, without, t, scale if t > 0 else 1.0)

    with torch.no_grad(): found = states(scheduler, start, estimate)
    key = f"sampler.traj_token_{method}_N4_cfg{scale:g}"
    golden_report.check("jit-sr sampler", key, found, tensors[key], STATES)


# ---- SD3's table ---------------------------------------------------------------------------------------------------

def test_flow_match_tables(golden, golden_report):
    from dit_sr_kit.schedulers import FlowMatchScheduler
    _, numbers = golden("dit4sr", "scheduler_shift3")
    scheduler = FlowMatchScheduler()
    check = lambda name, actual: golden_report.check("flow match table", name, actual.double(), torch.tensor(numbers[name]).double(), 1e-7 * max(1, actual.max().item()))
    check("train_sigmas_first5_last5", torch.cat([scheduler.train_sigmas[:5], scheduler.train_sigmas[-5:]]))
    check("train_sigma_index_500", scheduler.train_sigmas[500])
    check("sigma_max", torch.tensor(scheduler.sigma_max))
    check("sigma_min", torch.tensor(scheduler.sigma_min))
    for steps in (4, 20, 28, 40):
        scheduler.set_timesteps(steps)
        check(f"inference_sigmas_{steps}", scheduler.sigmas)
        check(f"inference_timesteps_{steps}", scheduler.timesteps)


# ---- names ---------------------------------------------------------------------------------------------------------

B = dict(input_size=256, patch_size=16, in_channels=3, hidden_size=768, depth=12, num_heads=12, mlp_ratio=4.0, bottleneck_dim=128)
L = dict(B, hidden_size=1024, depth=24, num_heads=16)
CLASSES = dict(num_classes=1000, in_context_len=32)
LR = dict(lr_size=64, lr_patch_size=4, lr_start=4)
RELEASED = {  # system, configuration, parameters of our network, keys in the file, preset
    "jit_b16_official": ("jit", dict(B, **CLASSES, in_context_start=4), 131_320_320, 183, "jit-b16"),
    "jit_l16_official": ("jit", dict(L, **CLASSES, in_context_start=8), 459_139_808, 351, "jit-l16"),
    "jit_b16_unconditional": ("jit", dict(B, num_classes=0), 130_526_976, 181, None),
    "jit_l16_unconditional": ("jit", dict(L, num_classes=0), 458_082_016, 349, None),
    "jit_b16_unconditional_gated": ("jit", dict(B, num_classes=0, gated=True), 137_614_080, 205, None),
    "jit_l16_unconditional_gated": ("jit", dict(L, num_classes=0, gated=True), 483_272_416, 397, None),
    "jitsr_b16_published": ("jit-sr", dict(B, **LR), 130_828_800, 188, "jit-sr-b16"),
    "jitsr_l16_published": ("jit-sr", dict(L, **LR), 458_482_400, 356, "jit-sr-l16"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_manifests(name):
    system, config, parameters, count, preset = RELEASED[name]
    ours, row = official_manifest(system, config), OFFICIAL_SYSTEMS[system]
    assert len(ours) == count and all(key.startswith("net.") for key in ours)
    with torch.device("meta"): model = row.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    back = official_state(row, model)
    assert {key: tuple(value.shape) for key, value in back.items()} | row.unused(model) == ours
    assert set(row.key_map(model)) == set(model.state_dict()) and len(back) == len(model.state_dict())
    if preset: assert official_manifest(system, preset) == ours
    for folder in [path for f in golden_folders() for path in (f, f.parent)]:
        path = folder / "manifests" / "jit" / f"{name}.json"
        if path.exists():
            listed = json.loads(path.read_text())
            assert ours == {key: tuple(shape) for key, shape in listed["state_dict"]}
            built = sum(torch.Size(shape).numel() for shape in row.unused(model).values())
            assert listed["total_parameters"] == parameters + built


def test_concat_is_the_same_file():
    token, concat = (official_manifest("jit-sr", dict(B, **LR, conditioning=how)) for how in ("token", "concat"))
    assert token == concat


def test_counts_of_the_presets():
    counts = {"jit-sr-b16": 130_828_800, "jit-sr-l16": 458_482_400, "jit-sr-b16-concat": 130_625_280, "jit-sr-l16-concat": 458_180_320}
    for name, count in counts.items(): assert sum(p.numel() for p in build(name, device="meta").parameters()) == count


def test_levels_of_a_training_checkpoint(golden):
    weights = single(golden("jit", "official_weights")[0])
    shifted = {which: {key: value if key == "net.pos_embed" else value + i for key, value in weights.items()}
               for i, which in enumerate(("model", "model_ema1", "model_ema2"))}
    file = dict(shifted, optimizer={"state": {}}, epoch=3, args={"model": "JiT-B/16"})
    bias = weights["net.final_layer.linear.bias"]
    for i, which in enumerate(("model", "model_ema1", "model_ema2")):
        assert torch.equal(load_official("jit", file, JIT, which=which).trunk.proj_out.bias, bias + i)
    assert torch.equal(load_official("jit", file, JIT).trunk.proj_out.bias, bias + 1), "evaluation uses the first average"
    with pytest.raises(CheckpointError, match="no level 'model_ema3'"): load_official("jit", file, JIT, which="model_ema3")


def test_positions_are_compared_or_filled_in(golden):
    weights = single(golden("jit", "official_weights")[0])
    without = {key: value for key, value in weights.items() if key != "net.pos_embed"}
    assert torch.equal(load_official("jit", without, JIT).pos_embed[0], position_table(4, 4, 48))
    with pytest.raises(CheckpointError, match="net.pos_embed: its values"):
        load_official("jit", weights | {"net.pos_embed": weights["net.pos_embed"].flip(1)}, JIT)
    with pytest.raises(CheckpointError, match="net.pos_embed"): load_official("jit", weights | {"net.pos_embed": torch.zeros(1, 9, 48)}, JIT)
    with pytest.raises(CheckpointError, match="left over"): load_official("jit", weights | {"net.extra": torch.zeros(1)}, JIT)


@pytest.mark.parametrize("prefix", ["net.", "", "module.net.", "_orig_mod.net."])
def test_prefixes(golden, prefix):
    weights = single(golden("jit", "official_weights")[0])
    named = {prefix + key.removeprefix("net."): value for key, value in weights.items()}
    assert torch.equal(load_official("jit", named, JIT).pos_embed, weights["net.pos_embed"])


def test_the_embedder_of_the_other_way_may_be_absent(golden):
    weights = single(golden("jit", "jitsr_weights")[0])
    first = {key: value for key, value in weights.items() if "x_embedder_concat" not in key}
    assert len(weights) - len(first) == 3
    load_official("jit-sr", first, dict(JIT_SR, conditioning="token"))
    with pytest.raises(CheckpointError, match="x_embedder_concat"): load_official("jit-sr", first, dict(JIT_SR, conditioning="concat"))
