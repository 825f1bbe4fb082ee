"Where reference numbers lie, and how we compare with them."
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent / "golden"
VARIABLE = "DIT_SR_GOLDEN"  # one more folder with the same sub-folders, for fixtures too large for the repository


def golden_folders():
    "The folders that are searched, in this order."
    more = os.environ.get(VARIABLE)
    return [HERE] + ([Path(more)] if more else [])


@lru_cache(maxsize=4)
def load_golden(system, name):
    "Tensors and header of one fixture; either is {} where there is no such file."
    for folder in golden_folders():
        header, tensors, arrays = (folder / system / f"{name}.{end}" for end in ("json", "safetensors", "npz"))
        if any(path.is_file() for path in (header, tensors, arrays)):
            loaded = load_file(tensors) if tensors.is_file() else {}
            if arrays.is_file():
                with np.load(arrays) as found: loaded |= {key: torch.from_numpy(found[key]) for key in found.files}
            return loaded, json.loads(header.read_text()) if header.is_file() else {}
    pytest.skip(f"fixture {system}/{name} is not here; set {VARIABLE} to a folder that holds {system}/{name}.json, .npz or .safetensors")


class GoldenReport:
    "Rows of (fixture, quantity, dtype, largest difference, tolerance)."

    def __init__(self):
        self.rows = []

    def check(self, fixture, quantity, actual, expected, tolerance):
        "Compare, remember the difference, and fail when it is above the tolerance."
        assert actual.shape == expected.shape, f"{quantity}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        difference = (actual.double() - expected.double()).abs().max().item()
        self.rows.append((fixture, quantity, str(actual.dtype).removeprefix("torch."), difference, tolerance))
        assert difference <= tolerance, f"{fixture} {quantity}: differs by {difference:.3e}, allowed {tolerance:.0e}"

    def table(self):
        "The rows as text, one line each."
        rows = sorted(set(self.rows))
        width = [max(len(row[i]) for row in rows) for i in range(3)]
        for fixture, quantity, dtype, difference, tolerance in rows:
            mark = "" if difference <= tolerance else "   ABOVE"
            yield (f"{fixture:{width[0]}}  {quantity:{width[1]}}  {dtype:{width[2]}}  "
                   f"{difference:9.2e}  (allowed {tolerance:.0e}){mark}")
