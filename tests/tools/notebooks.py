"Execute notebooks in place, cleanly: `python tests/tools/notebooks.py execute [NOTEBOOK ...]`."
import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
_WIDGET = "application/vnd.jupyter.widget-view+json"


def all_notebooks():
    "Every notebook, in reading order: chapters export what labs use."
    order = {"chapters": 0, "labs": 1, "howto": 2}
    found = [p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return sorted(found, key=lambda p: (order.get(p.parent.name, 3), p.name))


def run(path, timeout=1800):
    "Run one notebook in a real kernel. Returns it with its outputs, and the seconds it took."
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    start = time.time()
    skipped = [c for c in nb.cells if c.cell_type == "code" and c.source.startswith("#| eval: false")]
    for cell in skipped: cell.metadata.setdefault("tags", []).append("skip-execution")
    NotebookClient(nb, timeout=timeout, kernel_name="python3", store_widget_state=False,
                   skip_cells_with_tag="skip-execution",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in skipped:
        cell.outputs = []
        cell.metadata.tags.remove("skip-execution")
        if not cell.metadata.tags: del cell.metadata["tags"]
    return nb, time.time() - start


def execute(path, timeout=1800):
    "Run one notebook and save it, cleaned, with its outputs. Returns the seconds it took."
    import nbformat
    from nbdev.clean import nbdev_clean

    nb, seconds = run(path, timeout)
    for cell in nb.cells:  # a widget without its kernel shows an error: the saved notebook goes without
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if _WIDGET not in o.get("data", {})]
    partial = path.with_suffix(".partial")
    nbformat.write(nb, partial)
    os.replace(partial, path)
    nbdev_clean(str(path), clear_all=False)
    return seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["execute", "list"])
    parser.add_argument("notebooks", nargs="*", help="notebooks to run (default: all)")
    args = parser.parse_args(argv)
    paths = [Path(n).resolve() for n in args.notebooks] or all_notebooks()
    if args.command == "list":
        print("\n".join(str(p.relative_to(ROOT)) for p in paths))
        return 0
    total = 0.0
    for path in paths:
        print(f"{path.relative_to(ROOT)} ...", end=" ", flush=True)
        seconds = execute(path)
        total += seconds
        print(f"{seconds:.0f} s")
    print(f"{len(paths)} notebooks in {total:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
