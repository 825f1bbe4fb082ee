"Every notebook runs from top to bottom in a kernel of its own."
import shutil
from pathlib import Path

import pytest

from tests.tools.notebooks import NBS, all_notebooks, run


@pytest.mark.parametrize("path", all_notebooks(), ids=lambda p: str(p.relative_to(NBS)))
def test_notebook_runs(path, tmp_path):
    shutil.copy(path, tmp_path)  # the committed outputs stay as they are
    run(tmp_path / path.name, timeout=900)
