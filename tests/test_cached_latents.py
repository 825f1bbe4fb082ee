"Stored latents: what a stopped run leaves is whole, what goes on ends at the same bytes."
import json

import pytest
import torch

from dit_sr_kit.cached_latents import LatentCache, cache_latents, encode_pairs
from dit_sr_kit.core import CheckpointError, ConfigError
from dit_sr_kit.datasets import PatchDataset
from dit_sr_kit.images import resize, to_signed
from dit_sr_kit.models import VQAutoencoder
from dit_sr_kit.models.autoencoders import SpaceToDepth


class Counted(torch.utils.data.Dataset):
    def __init__(self, pairs, fail_at=None): self.pairs, self.fail_at, self.asked = pairs, fail_at, []
    def __len__(self): return len(self.pairs)
    def __getitem__(self, i):
        if i == self.fail_at: raise OSError("the power is gone")
        self.asked.append(i)
        return self.pairs[i]


@pytest.fixture(scope="module")
def pairs():
    return PatchDataset(size=16, length=10, seed=0)


def store(pairs, folder, autoencoder=SpaceToDepth(4), **more):
    return cache_latents(pairs, autoencoder, folder, **{**dict(items=4, batch_size=3, progress=False), **more})


def test_items(pairs, tmp_path):
    cache = store(pairs, tmp_path, dtype=torch.float32)
    assert len(cache) == 10 and sorted(p.name for p in tmp_path.iterdir())[1:] == [f"latents-{i:05d}.safetensors" for i in range(3)]
    for i in (0, 3, 4, 9):
        hr, lr = pairs[i]
        x0, y, small = cache[i]
        assert torch.equal(small, (lr * 255).round() / 255)
        torch.testing.assert_close(x0, SpaceToDepth(4).encode(to_signed(hr[None]))[0], rtol=0, atol=0)
        torch.testing.assert_close(y, SpaceToDepth(4).encode(to_signed(resize(small[None], scale=4)))[0], rtol=0, atol=1e-6)
    for i in (-1, 10):
        with pytest.raises(IndexError): cache[i]


def test_half_precision_and_a_network(pairs, tmp_path):
    torch.manual_seed(0)
    vq = VQAutoencoder(num_codes=16, base_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, sample_size=16).eval()
    cache = store(pairs, tmp_path, vq)
    with torch.no_grad(): exact = vq.encode(to_signed(pairs[5][0][None]))[0]
    assert ((cache[5][0] - exact).abs() <= 2**-11 * exact.abs() + 1e-5).all()
    other = VQAutoencoder(num_codes=16, base_channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, sample_size=16).eval()
    with pytest.raises(ConfigError, match="something else: weights differ"):
        store(pairs, tmp_path, other)


def test_no_enlargement(tmp_path):
    faces = [(torch.rand(3, 8, 8), torch.rand(3, 8, 8))]
    x0, y, lr = store(faces, tmp_path)[0]
    assert x0.shape == y.shape == (48, 2, 2) and lr.shape == (3, 8, 8)
    batch = encode_pairs(faces[0][0][None], faces[0][1][None], SpaceToDepth(4))
    assert set(batch) == {"x0", "y", "lr"} and batch["lr"].dtype == torch.uint8


def test_stopped_and_gone_on(pairs, tmp_path):
    store(pairs, tmp_path / "whole")
    with pytest.raises(OSError):
        store(Counted(pairs, fail_at=6), tmp_path / "cut")
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["index.json", "latents-00000.safetensors"]
    with pytest.raises(CheckpointError, match="1 of 3 shards"):
        LatentCache(tmp_path / "cut")
    counted = Counted(pairs)
    store(counted, tmp_path / "cut")
    assert sorted(set(counted.asked) - {0, 9}) == [4, 5, 6, 7, 8]               # 0 and 9 also for the comparison
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    counted = Counted(pairs)
    store(counted, tmp_path / "cut")
    assert counted.asked == [0, 9]                                              # all is there


def test_a_damaged_shard_is_written_again(pairs, tmp_path):
    store(pairs, tmp_path)
    path = tmp_path / "latents-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        LatentCache(tmp_path)
    store(pairs, tmp_path)
    assert path.read_bytes() == whole


def test_other_pairs_or_layouts_are_refused(pairs, tmp_path):
    store(pairs, tmp_path)
    for wrong, what in [(dict(pairs=PatchDataset(size=16, length=10, seed=1)), "first_pair, last_pair"), (dict(items=5), "items_per_shard"),
                        (dict(dtype=torch.bfloat16), "dtype"), (dict(autoencoder=SpaceToDepth(2)), "config")]:
        with pytest.raises(ConfigError, match=what):
            store(**{**dict(pairs=pairs, folder=tmp_path), **wrong})
    for wrong in (dict(pairs=[]), dict(items=0), dict(batch_size=0)):
        with pytest.raises(ConfigError, match="1 or more"):
            store(**{**dict(pairs=pairs, folder=tmp_path), **wrong})


def test_index_errors(pairs, tmp_path):
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        LatentCache(tmp_path)
    store(pairs, tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSONDecodeError"):
        LatentCache(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="cannot be read"):
        LatentCache(tmp_path)


def test_workers(pairs, tmp_path):
    cache = store(pairs, tmp_path)
    alone = torch.stack([cache[i][0] for i in range(10)])
    loader = torch.utils.data.DataLoader(cache, batch_size=5, num_workers=2)
    assert torch.equal(torch.cat([x0 for x0, _, _ in loader]), alone)
