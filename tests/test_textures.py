"Textures say what they are; words are the same vectors everywhere."
import pytest
import torch

from dit_sr_kit.core import ConfigError, make_generator
from dit_sr_kit.textures import TEXTURES, WordTable, texture


@pytest.mark.parametrize("text", TEXTURES)
def test_textures(text):
    a = texture(text, 32, make_generator(1))
    assert a.shape == (1, 3, 32, 32) and a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1
    assert torch.equal(a, texture(text, 32, make_generator(1))) and not torch.equal(a, texture(text, 32, make_generator(2)))
    assert a.flatten(2).std(-1).max() > 0.02


def test_fine_is_finer_than_coarse():
    def changes(text):  # how often neighbours differ
        pictures = torch.cat([texture(text, 48, make_generator(i)) for i in range(12)])
        pictures = (pictures - pictures.mean((2, 3), keepdim=True)) / pictures.std((1, 2, 3), keepdim=True)
        return pictures.diff(dim=-1).abs().mean() + pictures.diff(dim=-2).abs().mean()
    for kind in ("stripes", "checks", "dots", "rings"): assert changes(f"fine {kind}") > 1.5 * changes(f"coarse {kind}")


def test_words():
    tokens, pooled = WordTable()(["fine stripes", "Stripes", "", "one two three four five"])
    assert tokens.shape == (4, 4, 16) and pooled.shape == (4, 16)
    assert torch.equal(tokens[0, 1], tokens[1, 0]) and not tokens[2].any() and not tokens[0, 2:].any()
    torch.testing.assert_close(pooled, tokens.sum(1) / 2)
    # the bundled networks were trained with these numbers
    torch.testing.assert_close(tokens[0, 0, :3], torch.tensor(FIRST), atol=1e-6, rtol=0)
    other = WordTable(8, 2)(["one two three"])[0]
    assert other.shape == (1, 2, 8)


FIRST = [0.740196, 0.987948, -0.625661]


def test_errors():
    with pytest.raises(ConfigError, match="no texture 'fine stripe'.*Did you mean 'fine stripes'"): texture("fine stripe")
    for bad in (dict(width=0), dict(length=0)):
        with pytest.raises(ConfigError, match="1 or more"): WordTable(**bad)
