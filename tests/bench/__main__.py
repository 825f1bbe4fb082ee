"Print the speed and size figures of this machine: `python -m tests.bench [--quick] [--only NAME ...] [--notebooks]`."
import argparse
import os
import platform
import sys
from pathlib import Path

PARTS = ("imports", "adafm", "attention", "modules", "forward", "jit", "restore", "build", "step", "gpu")


def machine():
    "What the numbers were measured on."
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (f"{model}, {os.cpu_count()} cores{load}; {torch.get_num_threads()} thread; "
            f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions: does the program work?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--notebooks", action="store_true", help="also run every notebook (minutes)")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # kernels that are started inherit it
    import pytest
    import torch

    from tests.bench import explorers, fast, gpu, jit, network, package

    torch.set_num_threads(1)
    print(machine() + ("; QUICK, these are no measurements" if args.quick else ""))
    known = {f.__name__: f for f in (package.imports, network.adafm, network.attention, fast.modules,
                                     fast.forward, jit.jit, network.restore,
                                     explorers.build, explorers.step, gpu.gpu, package.notebooks)}
    for name in [*args.only, *(["notebooks"] if args.notebooks else [])]:
        print(f"\n{known[name].__doc__}")
        try:
            for label, value, note in known[name](args.quick): print(f"  {label:38} {value:>22}  {note}", flush=True)
        except pytest.skip.Exception as reason: print(f"  left out: {reason}")
        except Exception as error: print(f"  failed: {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
