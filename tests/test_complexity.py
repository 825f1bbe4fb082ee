"Counting a network: the formulas on one layer, the paper's table, and what the counter of PyTorch sees."
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dit_sr_kit.complexity import complexity
from dit_sr_kit.models import DiTSR, ResShiftUNet
from dit_sr_kit.presets import build

SMALL = dict(sample_size=16, base_channels=32, channel_mult=(1, 2), attention_resolutions=(16, 8), depth=2,
             hidden_size=32, attention_head_dim=16, window_size=4, mlp_ratio=2.0, cond_size=16)


@pytest.mark.parametrize("name,paper,attention", [("dit-sr", 93.03, 96.228), ("dit-sr-lite", 49.17, 50.986),
                                                  ("dit-sr-ushape-shallow", 96.30, None)])
def test_the_paper(name, paper, attention):
    "The published cost to two decimals; the other rows of the table are checked in the chapter."
    cost = complexity(build(name, device="meta"))
    assert f"{cost.paper / 1e9:.2f}" == f"{paper:.2f}"
    if attention: assert f"{cost.matrix_products / 1e9:.3f}" == f"{attention:.3f}"


def test_resshift():
    cost = complexity(build("resshift", device="meta"))
    assert cost.parameters == 118_593_583 and cost.frequency == 0 and 100 < cost.paper / 1e9 < 101


@pytest.mark.parametrize("kind", [DiTSR, ResShiftUNet])
def test_against_a_real_forward(kind):
    "What PyTorch counts while the network really runs; fused attention is written out so that it is seen."
    torch.manual_seed(0)
    extra = dict(adafm_impl="fft") if kind is DiTSR else {}
    model = kind(**SMALL, **extra).eval()
    for module in model.modules():
        if getattr(module, "impl", None) == "sdpa": module.impl = "explicit"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 16, 16))
    assert counter.get_total_flops() == complexity(model).matrix_products


def test_the_parts_add_up():
    model = DiTSR(**SMALL)
    cost = complexity(model)
    assert cost.total == cost.products + cost.attention + cost.frequency + cost.elementwise
    assert cost.frequency > 0 and complexity(DiTSR(**SMALL, time_conditioning="adaln")).frequency == 0
    larger = complexity(model, sample_size=32)
    assert larger.attention == 4 * cost.attention and larger.parameters == cost.parameters
    assert 3.9 < larger.elementwise / cost.elementwise <= 4


def test_training_mode_and_weights_stay():
    model = DiTSR(**SMALL).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    complexity(model)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.config = SimpleNamespace(sample_size=4, cond_size=4, in_channels=3, cond_channels=3)

    from_config = classmethod(lambda cls, config: cls())

    def forward(self, sample, timestep, cond): return torch.nn.functional.gelu(self.conv(torch.cat([sample, cond], dim=1)))


def test_one_layer():
    cost = complexity(OneLayer())
    assert cost.products == 2 * 9 * 6 * 8 * 16 and cost.elementwise == 2 * 8 * 16  # bias and GELU
