"Peak memory of a 2048 x 2048 result in tiles, against one tile: `python -m tests.bench.tiles`."
import resource
import subprocess
import sys
import warnings

SIDE, TILE = 512, 64  # LR pixels


def measure(side):
    "Peak resident MiB of a fresh process that restores one picture, and before it began."
    import torch

    from dit_sr_kit import SRPipeline

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    pipe = SRPipeline.from_preset("dit-sr-tiny", device="cpu")
    before = peak()
    pipe(torch.rand(1, 3, side, side), num_inference_steps=1, seed=0, tile=TILE, overlap=0, progress=False)
    print(before, peak())


def main():
    rows = {}
    for side in (TILE, SIDE):
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.tiles", str(side)]
        rows[side] = [float(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
        print(f"{side} x {side} LR pixels in tiles of {TILE}: {rows[side][0]:.0f} MiB before, {rows[side][1]:.0f} MiB at the peak")
    pixels = (4 * SIDE) ** 2
    pictures = (3 * 4 * pixels / 16 + 3 * 4 * pixels + 4 * pixels + 2 * 3 * pixels) / 2**20  # LR, result, weights, 8 bits twice
    print(f"pictures {pictures:.0f} MiB; the peak is {(rows[SIDE][1] - pictures) / rows[TILE][1]:.2f} times that of one tile, "
          f"growth {(rows[SIDE][1] - rows[SIDE][0] - pictures) / (rows[TILE][1] - rows[TILE][0]):.2f} times")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
