"Errors, seeds, devices and atomic files."
import json
import math
import subprocess
import sys
import threading

import pytest
import torch

from dit_sr_kit import core


@pytest.mark.parametrize("ours, builtin", [
    (core.ImageError, ValueError), (core.ConfigError, ValueError), (core.CheckpointError, RuntimeError),
    (core.WeightsUnavailable, RuntimeError), (core.MissingExtra, ImportError)])
def test_errors_are_ours_and_builtin(ours, builtin):
    assert issubclass(ours, core.DitSrError) and issubclass(ours, builtin)


def test_core_does_not_import_torch():
    code = "import sys, dit_sr_kit.core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_require():
    assert core.require("json", "dev") is json
    with pytest.raises(core.MissingExtra, match=r"pip install 'dit_sr_kit\[train\]'") as caught:
        core.require("not_a_package_at_all.sub", "train")
    assert str(caught.value).startswith("not_a_package_at_all ")
    assert isinstance(caught.value.__cause__, ImportError)


def test_nearest_name():
    assert "'chelsea'" in core.nearest_name("chelsie", ["coffee", "chelsea"])
    assert core.nearest_name("zzz", ["coffee"]) == ""
    assert core.nearest_name(7, []) == ""


def test_atomic_path_writes_and_makes_folders(tmp_path):
    target = tmp_path / "a" / "b" / "x.json"
    with core.atomic_path(target) as partial:
        assert partial.parent == target.parent and partial.suffix == ".json" and partial != target
        partial.write_text("1")
        assert not target.exists()
    assert target.read_text() == "1" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_keeps_the_old_file(tmp_path, error):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(error):
        with core.atomic_path(str(target)) as partial:
            partial.write_text("half")
            raise error
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_atomic_path_nothing_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        with core.atomic_path(tmp_path / "x.txt"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_atomic_path_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with core.atomic_path(tmp_path / "x") as partial:
        partial.write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_path_two_writers(tmp_path):
    target, size = tmp_path / "x", 20000

    def write(letter):
        for _ in range(20):
            with core.atomic_path(target) as partial:
                partial.write_text(letter * size)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert target.read_text() in ("a" * size, "b" * size) and list(tmp_path.iterdir()) == [target]


def test_get_device():
    assert core.get_device("cpu") == torch.device("cpu")
    assert core.get_device().type in ("cpu", "cuda", "mps")
    assert core.get_device(torch.device("cpu")) == torch.device("cpu")
    for bad in ["cuda:99", "gpu", "cuda:x", ""]:
        with pytest.raises(core.ConfigError):
            core.get_device(bad)


def test_make_generator_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    a, b = core.make_generator(5), core.make_generator(5)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_draw_noise_is_one_noise_in_every_precision(dtype):
    reference = core.draw_noise((2, 3, 5), core.make_generator(1))
    other = core.draw_noise((2, 3, 5), core.make_generator(1), dtype=dtype)
    assert reference.dtype == torch.float32 and other.dtype == dtype
    assert torch.equal(other, reference.to(dtype))


def test_draw_noise_given():
    noise = torch.ones(1, 2, dtype=torch.float64)
    assert core.draw_noise((1, 2), noise=noise) is noise
    assert core.draw_noise([1, 2], noise=noise, dtype=torch.float32).dtype == torch.float32
    with pytest.raises(core.ConfigError, match=r"\(1, 2\), expected \(2, 1\)"):
        core.draw_noise((2, 1), noise=noise)


def test_draw_noise_without_a_generator_uses_the_global_one():
    torch.manual_seed(3)
    a = core.draw_noise((4,))
    torch.manual_seed(3)
    assert torch.equal(a, core.draw_noise((4,)))


def test_draw_noise_is_standard_normal():
    n = 2**16
    x = core.draw_noise((n,), core.make_generator(0), dtype=torch.float64)
    assert abs(x.mean()) < 4 / math.sqrt(n) and abs(x.var() - 1) < 4 * math.sqrt(2 / n)


def test_check_image_batch():
    x = torch.rand(2, 3, 4, 5)
    assert core.check_image_batch(x, "x") is x
    assert core.check_image_batch(x.double() * 3 - 1) is not None
    with_infinity = x.clone()
    with_infinity[1, 2, 3, 4] = float("inf")
    with_nan = with_infinity.clone()
    with_nan[0, 0, 0, 0] = float("nan")
    for bad, hint in [([1], "list"), (x[0], r"\(3, 4, 5\)"), (x[:, :1], r"\(2, 1, 4, 5\)"), (x[:0], "not one pixel"),
                      (x[..., :0], "not one pixel"), (x.byte(), "uint8"), (with_infinity, "1 values"),
                      (with_nan, "2 values")]:
        with pytest.raises(core.ImageError, match=hint) as caught:
            core.check_image_batch(bad, "the LR image")
        assert str(caught.value).startswith("the LR image")


def test_environment_report():
    report = core.environment_report()
    assert json.loads(json.dumps(report)) == report
    assert report["packages"]["torch"] == torch.__version__ or report["packages"]["torch"] in torch.__version__
    assert {"python", "system", "device", "gpus"} <= set(report)
