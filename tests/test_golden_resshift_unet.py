"ResShift's U-Net against stored results of the official class (weights and inputs are seeded random numbers)."
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin

from dit_sr_kit.checkpoints import load_official
from dit_sr_kit.models import ResShiftUNet
from dit_sr_kit.models.dit_sr import WindowBlock

NAME = "resshift_unetmodelswin"
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-9}
SMALL = dict(sample_size=16, base_channels=32, channel_mult=(1, 1), num_res_blocks=(2, 1), attention_resolutions=(16, 8),
             hidden_size=32, attention_head_dim=16, window_size=4, mlp_ratio=2.0, cond_size=16)


def reference(golden):
    g, about = golden("ditsr", NAME)
    return g, load_official("resshift", {key[2:]: value for key, value in g.items() if key.startswith("w.")}, about["config"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["sdpa", "explicit"])
def test_outputs(golden, golden_report, dtype, impl):
    g, model = reference(golden)
    model.to(dtype)
    for module in model.modules():
        if hasattr(module, "impl"): module.impl = impl
    suffix = "" if dtype == torch.float32 else "_f64"
    for i in (0, 1):  # io1 is not square and differs from the size of the design
        x, t, lq = g[f"io{i}.x"].to(dtype), g[f"io{i}.t"], g[f"io{i}.lq"].to(dtype)
        with torch.no_grad(): out = model(x, t, lq)
        golden_report.check(NAME, f"io{i}.out, {impl}", out, g[f"io{i}.out{suffix}"], TOLERANCE[dtype])


@pytest.mark.parametrize("error", ["scale and shift", "no shortcut", "textbook mask", "one step late"])
def test_deliberate_errors_show(golden, error):
    "The comparison would notice: each of these moves the output far beyond the tolerance."
    g, model = reference(golden)
    model.double()
    for block in model.modules():
        if error == "scale and shift" and hasattr(block, "modulation"):
            block.modulation.linear.weight.data = torch.cat(block.modulation.linear.weight.data.chunk(2)[::-1])
            block.modulation.linear.bias.data = torch.cat(block.modulation.linear.bias.data.chunk(2)[::-1])
        if error == "no shortcut" and isinstance(getattr(block, "skip", None), torch.nn.Conv2d):
            torch.nn.init.zeros_(block.skip.weight)
        if error == "textbook mask" and isinstance(block, WindowBlock): block.attn.mask_style = "textbook"
    t = g["io0.t"] + (error == "one step late")
    with torch.no_grad(): out = model(g["io0.x"].double(), t, g["io0.lq"].double())
    assert (out - g["io0.out_f64"]).abs().max() > 1e-3


def test_saving_and_loading(tmp_path):
    torch.manual_seed(0)
    model = ResShiftUNet(**SMALL).eval()
    assert isinstance(model, ModelMixin) and isinstance(model, ConfigMixin)
    model.save_pretrained(tmp_path)
    again = ResShiftUNet.from_pretrained(tmp_path)
    args = torch.randn(1, 3, 16, 16), 3, torch.randn(1, 3, 16, 16)
    with torch.no_grad(): assert torch.equal(model(*args), again(*args))
    assert again.config.num_res_blocks == (2, 1) or list(again.config.num_res_blocks) == [2, 1]


def test_contract():
    "The call of `DiTSR`: a number or one per sample, any multiple of `size_multiple`, the dtype of the weights."
    torch.manual_seed(0)
    model = ResShiftUNet(**SMALL).eval()
    assert model.size_multiple == 8 and model.dtype == torch.float32
    x, cond = torch.randn(2, 3, 24, 8), torch.randn(2, 3, 24, 8)
    with torch.no_grad():
        whole = model(x, 4, cond)
        assert whole.shape == x.shape
        torch.testing.assert_close(model(x, torch.tensor([4, 4]), cond), whole)
        torch.testing.assert_close(model(x[:1], torch.tensor(4), cond[:1]), whole[:1], atol=1e-5, rtol=1e-5)
        half = model.to(torch.bfloat16)
        assert half(x.bfloat16(), 4, cond.bfloat16()).dtype == torch.bfloat16


def test_one_number_of_res_blocks_stands_for_all():
    one, many = (ResShiftUNet(**SMALL | dict(num_res_blocks=n)) for n in (2, (2, 2)))
    assert one.state_dict().keys() == many.state_dict().keys()


def test_a_fresh_residual_block_is_its_shortcut():
    from dit_sr_kit.models.resshift_unet import ResBlock

    torch.manual_seed(0)
    x, temb = torch.randn(1, 32, 8, 8), torch.randn(1, 64)
    assert torch.equal(ResBlock(32, 32, 64)(x, temb), x)
    wider = ResBlock(32, 64, 64)
    assert torch.equal(wider(x, temb), wider.skip(x))


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = ResShiftUNet(**SMALL)
    for block in model.modules():
        if hasattr(block, "modulation"): torch.nn.init.normal_(block.conv_out.weight, std=0.05)
    model(torch.randn(1, 3, 16, 16), 3, torch.randn(1, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
