"How long a newcomer waits before anything happens."
import subprocess
import sys
import time


def _python(code, repeat):
    "Best wall time of a new interpreter that runs `code`, less the time of one that runs nothing."
    def best(text):
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", text], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        return min(times)
    return max(0.0, best(code) - best("pass"))


def imports(quick):
    "Import times of the package, in new processes."
    repeat = 1 if quick else 5
    heavy = "import sys, dit_sr_kit; sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    light = subprocess.run([sys.executable, "-c", heavy]).returncode == 0
    yield "import dit_sr_kit", f"{1e3 * _python('import dit_sr_kit', repeat):.0f} ms", \
        "torch, numpy and matplotlib are " + ("not imported" if light else "IMPORTED")
    shown = _python("from dit_sr_kit.cli import main; main(['--help'])", repeat)
    yield "dit-sr --help", f"{1e3 * shown:.0f} ms", "without the start of Python"
    both = _python("import torch", repeat), _python("import dit_sr_kit.pipelines", repeat)
    yield "import dit_sr_kit.pipelines", f"{both[1]:.2f} s", f"of which torch {both[0]:.2f} s"


def notebooks(quick):
    "Wall time of every notebook, run in a kernel and not saved."
    from tests.tools.notebooks import ROOT, all_notebooks, run

    total = 0.0
    for path in all_notebooks()[:1 if quick else None]:
        taken = run(path)[1]
        total += taken
        yield str(path.relative_to(ROOT)), f"{taken:.0f} s", ""
    yield "all of them, one after the other", f"{total:.0f} s", ""
