"The wheel holds what the library needs at run time."
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "dit_sr_kit" / "assets"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    import shutil

    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dit_sr_kit", source / "dit_sr_kit", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "-w", str(out), str(source)], check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_has_modules_and_assets(wheel):
    names = set(wheel.namelist())
    for path in (ROOT / "dit_sr_kit").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts: assert str(path.relative_to(ROOT)) in names, path
    assert not [n for n in names if n.startswith(("tests", "nbs"))]


def test_every_weight_has_a_card(wheel):
    import hashlib
    import json

    weights = sorted((ASSETS / "weights").glob("*.safetensors"))
    assert weights
    for path in weights:
        card = json.loads(path.with_suffix(".json").read_text())
        assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        for key in ("data", "command", "seed", "device", "date", "steps", "quality"): assert card[key] not in (None, "", {}), key
    assert sum(p.stat().st_size for p in weights) <= 20 * 2**20


def test_metadata(wheel):
    text = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("METADATA"))
    for line in ("Requires-Python: >=3.10", "Provides-Extra: lab", "Provides-Extra: metrics", "Provides-Extra: train",
                 "Provides-Extra: dev"):
        assert line in text
    entry = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert "dit-sr = dit_sr_kit.cli:main" in entry or "dit-sr=dit_sr_kit.cli:main" in entry
