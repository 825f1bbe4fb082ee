"JiT's network against a plain reading of its equations: same weights, same inputs, one process, taking turns."
import math

import torch
import torch.nn.functional as F

from tests.bench.fast import _noise, _rows


def turns(side, head_dim):
    "Cosines and sines of every token and channel, `[side * side, head_dim]`: rows first, neighbours alike."
    half = head_dim // 2
    ladder = torch.tensor([10000.0 ** (-2 * k / half) for k in range(half // 2)])
    row, col = (torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side))
    angles = torch.cat([place[:, None] * ladder for place in (row, col)], 1).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


def plain_jit(w, patch, heads, start, cos, sin):
    "The network as functions of its weights `w`: no module, softmax written out; the tables are made before."
    tokens, depth = w["class_tokens"].shape[1], 1 + max(int(k.split(".")[2]) for k in w if k.startswith("trunk.blocks"))
    still = torch.ones(tokens, cos.shape[1]), torch.zeros(tokens, cos.shape[1])
    longer = [torch.cat(pair) for pair in zip(still, (cos, sin))]

    def linear(x, name): return x @ w[name + ".weight"].T + w[name + ".bias"]
    def norm(x, name): return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[name + ".weight"]
    def modulate(x, shift, scale): return x * (1 + scale[:, None]) + shift[:, None]
    def turn(x, cos, sin): return x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2) * sin

    def attend(x, name, cos, sin):
        b, n, width = x.shape
        q, k, v = linear(x, name + "to_qkv").view(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k = turn(norm(q, name + "norm_q"), cos, sin), turn(norm(k, name + "norm_k"), cos, sin)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        return linear((weights @ v).transpose(1, 2).reshape(b, n, width), name + "to_out")

    def call(z, t, y):
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "time_embedding.linear_1")), "time_embedding.linear_2")
        label = w["class_embedding.weight"][y]
        c = F.silu(c + label)
        side, table = z.shape[-1] // patch, (cos, sin)
        h = F.conv2d(z, w["patch_embed.proj1.weight"], stride=patch).flatten(2).transpose(1, 2)
        h = linear(h, "patch_embed.proj2") + w["pos_embed"]
        for i in range(depth):
            if i == start: h, table = torch.cat([label[:, None] + w["class_tokens"], h], 1), longer
            b = f"trunk.blocks.{i}."
            b1, s1, g1, b2, s2, g2 = linear(c, b + "modulation.linear").chunk(6, 1)
            h = h + g1[:, None] * attend(modulate(norm(h, b + "norm1"), b1, s1), b + "attn.", *table)
            gate, value = linear(modulate(norm(h, b + "norm2"), b2, s2), b + "mlp.proj_in").chunk(2, -1)
            h = h + g2[:, None] * linear(F.silu(gate) * value, b + "mlp.proj_out")
        shift, scale = linear(c, "trunk.modulation.linear").chunk(2, 1)
        out = linear(modulate(norm(h[:, tokens:], "trunk.norm_out"), shift, scale), "trunk.proj_out")
        return out.view(-1, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)

    return call


@torch.no_grad()
def jit(quick):
    "JiT-B/16 at 256 px, plain / ours, batch 1; random weights, no zeros."
    from dit_sr_kit.models import JiT

    small = dict(sample_size=32, patch_size=8, hidden_size=48, depth=3, num_heads=3, class_token_start=1)
    torch.manual_seed(0)
    model = JiT(**small if quick else {}).eval()
    for p in model.parameters():
        if not p.any(): p.normal_(std=0.02)  # a fresh network answers 0 and would hide every difference
    c = model.config
    tables = turns(c.sample_size // c.patch_size, c.hidden_size // c.num_heads)
    plain = plain_jit(model.state_dict(), c.patch_size, c.num_heads, c.class_token_start, *tables)
    z, t, y = _noise(1, 3, c.sample_size, c.sample_size), torch.tensor([0.3]), torch.tensor([207])
    name = "a small JiT" if quick else "JiT-B/16"
    yield _rows(f"{name}, one forward", lambda: plain(z, t, y), lambda: model(z, t, y), 1 if quick else 5)
