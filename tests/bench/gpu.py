"Memory and time on a CUDA device: training DiT-SR, and restoring with its autoencoder, plain against fast."
import copy
import datetime
import statistics
import time

import torch

from tests.bench import milliseconds


def wait(device):
    "A GPU works on after a call has returned; the clock must not stop before it does."
    if torch.device(device).type == "cuda": torch.cuda.synchronize(device)


def measured(device, *calls, repeat=5):
    "Of each call: median seconds, peak GiB of all tensors, and peak GiB above what was there before (0 on a CPU)."
    cuda = torch.device(device).type == "cuda"
    times, peaks = [[] for _ in calls], [(0.0, 0.0) for _ in calls]
    for turn in range(repeat + 1):
        for i, call in enumerate(calls):  # they take turns
            wait(device)
            if cuda: torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) if cuda else 0
            start = time.perf_counter()
            call()
            wait(device)
            if turn: times[i].append(time.perf_counter() - start)  # the first call pays for caches
            if cuda:
                peak = torch.cuda.max_memory_allocated(device)
                peaks[i] = peak / 2**30, (peak - before) / 2**30
    return [(statistics.median(taken), *peak) for taken, peak in zip(times, peaks)]


def training_step(name, batch, device, half):
    "One optimiser step of a preset's network on random latents, as a call without arguments."
    from dit_sr_kit.presets import build

    model = build(name, device=device).train()
    config, side = model.config, model.config.sample_size
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    x0, cond = draw(batch, config.in_channels, side, side), draw(batch, 3, config.cond_size, config.cond_size)
    noisy, t = x0 + draw(*x0.shape), torch.zeros(batch, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            loss = (model(noisy, t, cond).float() - x0).square().mean()
        loss.backward()
        optimizer.step()

    return step


def pipelines(name, device):
    "The pipeline of a preset with random weights: as the equations read, fast, and fast in bfloat16."
    from dit_sr_kit.parts import part_class
    from dit_sr_kit.pipelines import SRPipeline
    from dit_sr_kit.presets import build, preset
    from tests.bench.fast import plain_copy

    row = preset(name)
    autoencoder = part_class("autoencoder", row.autoencoder)(**row.autoencoder_config)
    make = lambda model: SRPipeline(model, row.process(**row.scheduler), copy.deepcopy(autoencoder), row.scale, name).to(device)
    fast = build(name)
    return make(plain_copy(fast)), make(fast), make(copy.deepcopy(fast)).to(dtype=torch.bfloat16)


def gpu(quick, device="cuda", name="dit-sr", batch=16, side=64, steps=15):
    "A CUDA device: a training step of dit-sr, and 64 x 64 LR pixels restored in 15 steps."
    import pytest

    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available(): pytest.skip("PyTorch sees no CUDA device, so nothing was measured")
        about = torch.cuda.get_device_properties(device)
        yield "card", about.name, f"{about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {datetime.date.today()}"
    repeat = 1 if quick else 5
    for half in (False, True):
        [(seconds, peak, _)] = measured(device, training_step(name, batch, device, half), repeat=repeat)
        yield (f"{name}, training, batch {batch}", f"{1 / seconds:.2f} steps/s",
               f"{'bfloat16 autocast' if half else 'float32'}, network and AdamW alone; peak {peak:.2f} GiB")
    lr = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    calls = [lambda pipe=pipe: pipe.sample(lr, steps, torch.Generator().manual_seed(0)) for pipe in pipelines(name, device)]
    found = measured(device, *calls, repeat=repeat)
    for label, (seconds, _, above) in zip(("plain, float32", "fast, float32", "fast, bfloat16"), found):
        yield (f"{name}, {steps} steps, {4 * side} px", milliseconds(seconds),
               f"{label}, with encoding and decoding: {found[0][0] / seconds:.2f} times as fast as plain; "
               f"peak {above:.2f} GiB beside the weights")
