"The rules of the house: levels, cycles, free names, sizes, notebooks in step with modules, notebook lint."
import ast
import builtins
import json
import re
import subprocess
import sys
import symtable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dit_sr_kit"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

LEVELS = {
    "core": 0,
    "images": 1, "spectra": 1, "schedulers.common": 1,
    "kernels": 1, "jpeg": 1, "color_jitter": 1, "real_degradations": 1.3, "degradations": 1.5,  # one calls the other by name
    "layers.embeddings": 1, "layers.windows": 1, "layers.modulation": 1, "layers.adafm": 1,
    "layers.preconditioning": 1, "layers.joint_attention": 1, "layers.jit_blocks": 1,
    "datasets": 2, "textures": 2, "folder_data": 2.5, "cached_latents": 2, "metrics": 2, "viz": 2, "schedulers.resshift": 2, "schedulers.dossr": 2, "schedulers.flow": 2,
    "models.dit_sr": 2, "models.dit4sr": 2, "models.jit_sr": 2, "models.dossr": 2, "models.autoencoders": 2,
    "models.vq_autoencoder": 2, "models.kl_autoencoder": 2, "models.rrdbnet": 2,
    "trajectory": 2, "tiling": 2, "color": 2, "explorers.fragment": 2,
    "models.resshift_unet": 2.5,  # shares its parts with DiT-SR
    "captures": 2, "attention_captures": 2.5,
    "explorers.runs": 2.5,  # what the explorers of a run share
    "models.dossr_system": 2.5, "official.dossr": 3, "dossr_pipeline": 4.5,  # one after the other
    "prompts": 2, "latent_tiles": 2.5, "dit4sr_pipeline": 4.5,
    "official.common": 1, "official.dit_sr": 3, "official.vqgan": 3, "official.jit": 3, "official.dit4sr": 3,
    "presets": 3, "complexity": 3, "explorers.trajectory": 3, "explorers.spectrum": 3, "explorers.adafm": 3,
    "explorers.attention": 3, "explorers.schedule": 3, "explorers.degradation": 3, "explorers.targets": 3,
    "checkpoints": 3.5, "memory": 3.6, "parts": 3.7,  # presets name configurations; pipelines read the authors' files
    "schedulers.other_formulations": 2, "schedulers.parametrisations": 2.5,
    "pipelines": 4, "faces": 4,
    "losses": 4, "batches": 4.5, "run_state": 4, "run_log": 4, "processes": 4,
    "training": 5, "evaluation": 5,
    "distillation": 6,
    "files": 6, "cli": 7,
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path):
    "Names of the package's own modules that a module imports, at the top or inside functions."
    here = module_name(path).split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level: base = here[:len(here) - node.level] + ([node.module] if node.module else [])
            elif (node.module or "").split(".")[0] == "dit_sr_kit": base = node.module.split(".")[1:]
            else: continue
            yield ".".join(base), [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dit_sr_kit": yield ".".join(alias.name.split(".")[1:]), []


def targets(path):
    "The modules behind the imports: a package stands for what its `__init__` imports."
    names = {module_name(p) for p in MODULES}
    for base, members in imports(path):
        for member in members or [""]:
            full = f"{base}.{member}".strip(".")
            if full in names: yield full
            elif base in names: yield base
            elif (PACKAGE / base.replace(".", "/") / "__init__.py").is_file() and base:
                init = ast.parse((PACKAGE / base.replace(".", "/") / "__init__.py").read_text())
                for node in ast.walk(init):
                    if isinstance(node, ast.ImportFrom) and any(a.name == member for a in node.names):
                        yield node.module.removeprefix("dit_sr_kit.") if not node.level else f"{base}.{node.module}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_the_levels(path):
    name = module_name(path)
    assert name in LEVELS, f"{name} has no level: add it to LEVELS and to the table of the house"
    for target in targets(path):
        assert LEVELS[target] < LEVELS[name], f"{name} (level {LEVELS[name]}) imports {target} (level {LEVELS[target]})"
        group = {name.split(".")[0], target.split(".")[0]}
        assert group != {"models", "schedulers"}, f"{name} imports {target}: models and schedulers meet in the pipeline"
        if name.startswith("explorers."): assert target.split(".")[0] not in ("models", "pipelines", "schedulers")


def test_no_star_imports():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom): assert all(a.name != "*" for a in node.names), path


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_size(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines"
    wide = [i + 1 for i, line in enumerate(lines) if len(line) > 110]
    start = next((i for i, line in enumerate(lines) if line.startswith("__all__")), None)
    if start is not None:  # nbdev lays that list out
        end = next(i for i in range(start, len(lines)) if lines[i].rstrip().endswith("]"))
        wide = [n for n in wide if not start < n <= end + 1]
    assert not wide, f"lines wider than 110 columns: {wide}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_hand_written_lists_fit(path):
    "What nbdev does not write has no exemption."
    assert not [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]


def free_names(table, known):
    "Global names that a function uses and nothing defines."
    for child in table.get_children():
        for symbol in child.get_symbols():
            if symbol.is_global() and symbol.is_referenced() and symbol.get_name() not in known: yield symbol.get_name()
        yield from free_names(child, known)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_name_is_defined_in_the_module(path):
    table = symtable.symtable(path.read_text(), str(path), "exec")
    known = set(dir(builtins)) | {"__file__", "__name__"}
    known |= {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    assert not sorted(set(free_names(table, known)))
    for symbol in table.get_symbols():
        if symbol.is_referenced(): assert symbol.get_name() in known, symbol.get_name()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_import_is_used(path):
    tree = ast.parse(path.read_text())
    imported = {(a.asname or a.name).split(".")[0] for node in tree.body
                if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not imported - used, f"imported and not used: {sorted(imported - used)}"


def test_import_is_light():
    code = "import dit_sr_kit, sys; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["cli", "core"])
def test_heavy_packages_are_imported_late(module):
    code = f"import dit_sr_kit.{module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_notebooks_and_modules_agree(tmp_path):
    "Exporting into a copy reproduces the committed modules."
    import shutil

    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("settings.ini", "setup.py", "README.md"): shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(PACKAGE, copy / "dit_sr_kit", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for path in MODULES: (copy / path.relative_to(ROOT)).unlink()
    subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=copy, check=True, capture_output=True)
    for path in [*MODULES, PACKAGE / "_modidx.py", PACKAGE / "__init__.py"]:
        assert (copy / path.relative_to(ROOT)).read_text() == path.read_text(), f"{path.name} differs: run nbdev_export"
    exported = {p.relative_to(copy) for p in (copy / "dit_sr_kit").rglob("*.py")}
    assert exported == {p.relative_to(ROOT) for p in PACKAGE.rglob("*.py")}


def test_quarto_symlink():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and link.resolve() == ROOT / "_quarto.yml"


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_lint(path):
    nb = json.loads(path.read_text())
    cells = nb["cells"]
    assert path.stat().st_size < 2 * 2**20, "larger than 2 MB"
    assert "widgets" not in nb["metadata"], "saved widget state"
    first = source(cells[0])
    assert first.startswith("# ") and "\n> " in first, "the first cell is a title and a subtitle"
    code = [c for c in cells if c["cell_type"] == "code"]
    words = sum(len(source(c).split()) for c in cells if c["cell_type"] == "markdown")
    assert words > 150, f"{words} words of prose"
    for cell in code:
        text = source(cell)
        for output in cell["outputs"]:
            assert output["output_type"] != "error", text
            data = output.get("data", {})
            assert not any(k.startswith(("image/", "application/vnd.jupyter")) for k in data), f"bare picture: {text[:80]}"
            for image in re.findall(r"<img\b[^>]*>", "".join(data.get("text/html", ""))):
                assert re.search(r'alt="[^"]{10,}"', image), f"a figure without alt text: {text[:80]}"
        skipped = text.startswith("#| eval: false")
        body = [l for l in text.splitlines() if l.strip() and not l.startswith("#")]
        mixed = any(re.match(r"(import|from)\s", l) for l in body) and not all(
            re.match(r"(import|from)\s|\s|\)", l) for l in body)
        assert skipped or not mixed or path.parent.name != "chapters", f"imports share a cell with code: {text[:120]}"
        assert skipped or not re.search(r"%pip|!pip", text), "a notebook does not install"
    assert any(c["outputs"] for c in code), "committed without outputs"
    prose = "\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    assert re.search(r"\bminutes?\b", prose), "says how long it takes"
    lowered = re.sub(r"`[^`]*`|\$[^$]*\$", "", prose)
    assert not re.search(r"\b[Ss]imply\b|\b[Oo]bviously\b", lowered), "no 'simply', no 'obviously'"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_links_and_equations(path):
    nb = json.loads(path.read_text())
    prose = "\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")
    code = "\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "code")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", prose):
        linked = path if not target else (path.parent / target)
        assert linked.exists(), f"dead link {target}"
        if anchor and linked.suffix == ".ipynb":
            text = "\n".join(source(c) for c in json.loads(linked.read_text())["cells"])
            assert f'id="{anchor[1:]}"' in text, f"no anchor {anchor} in {linked.name}"
    tags = re.findall(r"\\tag\{([^}]+)\}", prose)
    assert len(tags) == len(set(tags)), "an equation is tagged twice"
    for tag in tags:
        assert f'<a id="{tag.lower()}"></a>' in prose, f"({tag}) has no anchor"
        assert f"({tag})" in code, f"no line of code names ({tag})"


def test_page_names_do_not_collide():
    pages = [(p.parent.name, re.sub(r"^\d+[a-z]?_", "", p.stem).lower()) for p in NOTEBOOKS]
    assert len(pages) == len(set(pages))


def test_product_speaks_of_itself():
    "No machine path gets into a file that is committed."
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    pattern = re.compile(r"/(?:root|home/\w+|work|tmp/\w+)/[\w.]+")
    for name in filter(None, files):
        path = ROOT / name
        if path.suffix in (".ipynb", ".py", ".md", ".ini", ".yml", ".json") and path.is_file() and path != Path(__file__):
            found = pattern.search(path.read_text(errors="replace"))
            assert not found, f"{name}: {found.group(0)}"
