"Trajectories: what is recorded, and what a file gives back."
import math
import os

import pytest
import torch

from dit_sr_kit.core import CheckpointError, ConfigError
from dit_sr_kit.trajectory import StepRecord, Trajectory

FIELDS = ("sample", "pred_original_sample", "sample_image", "pred_image")


def make(steps=3, dtype=torch.float32, **kwargs):
    "A small run in a latent of four channels, decoded to 16 pixels."
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.rand(*s, generator=g)
    out = Trajectory(lr=draw(2, 3, 4, 4), hr=draw(2, 3, 16, 16), meta={"preset": "toy", "nested": {"a": [1, 2.5, None]}}, **kwargs)
    for i in range(steps):
        out.record(i, torch.tensor(steps - 1 - i), draw(2, 4, 4, 4).to(dtype), draw(2, 4, 4, 4).to(dtype),
                   {"eta": torch.tensor(0.1 * i, dtype=torch.float64), "snr": math.inf}, draw(2, 3, 16, 16), draw(2, 3, 16, 16))
    out.result = draw(2, 3, 16, 16)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_file_gives_back_every_bit(tmp_path, dtype):
    run = make(dtype=dtype)
    back = Trajectory.load(run.save(tmp_path / "run.safetensors"))
    assert len(back) == 3 and back.scale == 4 and back.meta == run.meta
    for name in ("lr", "hr", "result"):
        assert torch.equal(getattr(back, name), getattr(run, name))
    for a, b in zip(run, back):
        assert (a.index, a.timestep, a.coefficients) == (b.index, b.timestep, b.coefficients)
        for name in FIELDS:
            assert getattr(b, name).dtype == getattr(a, name).dtype and torch.equal(getattr(b, name), getattr(a, name))


def test_same_run_same_bytes(tmp_path):
    a, b = make().save(tmp_path / "a"), make().save(tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()


def test_empty_and_partial_runs_survive(tmp_path):
    assert len(Trajectory.load(Trajectory().save(tmp_path / "empty"))) == 0
    run = Trajectory(scale=2)
    run.record(0, 0.25, torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), {})
    back = Trajectory.load(run.save(tmp_path / "partial"))
    assert back.scale == 2 and back.lr is None and back[0].timestep == 0.25 and back[0].pred_image is None


def test_record_copies_what_the_loop_goes_on_changing():
    run, x = Trajectory(), torch.zeros(1, 3, 8, 8, requires_grad=True)
    run.record(0, 3, x, x, {})
    with torch.no_grad():
        x.add_(1)
    assert not run[0].sample.requires_grad and run[0].sample.max() == 0 and run[0].timestep == 3


def test_is_a_sequence():
    run = make()
    assert isinstance(run[0], StepRecord) and run[-1].index == 2 and [r.index for r in run[1:]] == [1, 2]
    assert run.coefficient("eta") == pytest.approx([0, 0.1, 0.2]) and math.isnan(run.coefficient("nothing")[0])
    assert "3 steps" in repr(run) and "hr" in repr(run)


def test_wrong_records_are_refused():
    run = make()
    z = torch.zeros(2, 4, 4, 4)
    with pytest.raises(ConfigError, match="index=3"):
        run.record(7, 0, z, z, {})
    with pytest.raises(ConfigError, match="expected the same"):
        run.record(3, 0, z, z[:1], {})
    with pytest.raises(ConfigError, match="new Trajectory"):
        run.record(3, 0, z[..., :2], z[..., :2], {})


def test_pictures_of_a_run():
    run = make()
    assert run.images("pred")[1] is run[1].pred_image and run.images("sample")[1] is run[1].sample_image
    pixel = Trajectory(lr=torch.zeros(1, 3, 4, 4))
    pixel.record(0, 0, torch.full((1, 3, 16, 16), -1.0), torch.full((1, 3, 16, 16), 3.0), {})
    assert pixel.images("sample")[0].max() == 0 and pixel.images("pred")[0].min() == 2  # not clamped
    latent = Trajectory(lr=torch.zeros(1, 3, 4, 4))
    latent.record(0, 0, torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), {})
    with pytest.raises(ConfigError, match="Decode it while recording"):
        latent.images()
    with pytest.raises(ConfigError, match="'pred'"):
        run.images("x")


def test_damage_is_found(tmp_path):
    path = make(steps=1).save(tmp_path / "run")
    good, bad = path.read_bytes(), tmp_path / "bad"
    g = torch.Generator().manual_seed(0)
    places = torch.randint(len(good), (150,), generator=g).tolist() + list(range(0, 3000, 37))
    for place in places:  # one flipped bit anywhere
        bad.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1:])
        with pytest.raises(CheckpointError):
            Trajectory.load(bad)
    for length in (0, 1, 8, 200, len(good) // 2, len(good) - 1):  # cut short
        bad.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="bad"):
            Trajectory.load(bad)


def test_other_files_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file
    with pytest.raises(CheckpointError, match="is not there"):
        Trajectory.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is not there"):
        Trajectory.load(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="a file of weights"):
        Trajectory.load(tmp_path / "weights")
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(CheckpointError):
        Trajectory.load(tmp_path / "pickle")


def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    run = make()
    before = run.save(tmp_path / "run").read_bytes()
    run.meta["when"] = object()
    with pytest.raises(ConfigError, match="JSON"):
        run.save(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"] and (tmp_path / "run").read_bytes() == before
