"Peak memory of a 2048 x 2048 result in tiles, against one tile: `python -m tests.bench.tiles`."
import resource
import subprocess
import sys
import warnings

SIDES, TILE = (64, 128, 512), 64  # LR pixels


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
    for side in SIDES:
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.tiles", str(side)]
        before, peak = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        pixels = (4 * side) ** 2  # LR, result, weights of the blend, four bytes in Pillow
        pictures = (3 * 4 * pixels / 16 + 3 * 4 * pixels + 4 * pixels + 4 * pixels) / 2**20
        print(f"{side:3d} x {side:<3d} LR pixels in tiles of {TILE}: {before:.0f} MiB before, {peak:.0f} MiB at the peak; grown by "
              f"{peak - before:.0f} MiB, of which the pictures are {pictures:.0f}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    measure(int(sys.argv[1])) if len(sys.argv) > 1 else main()
