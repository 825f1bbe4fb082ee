"A small run in a process of its own: `python -m tests.training_worker '{\"out\": ...}' [shard]`."
import json
import sys
from dataclasses import replace

from dit_sr_kit import presets, training
from dit_sr_kit.training import TrainConfig, fit


def small_preset():
    "The skeleton of dit-sr-tiny, one block deep and half as wide: a step takes a few hundredths of a second."
    small = presets._tiny(depth=1, base_channels=32, hidden_size=32)
    presets._PRESETS["small"] = replace(presets.preset("dit-sr-tiny"), config=small, weights=None)


def config(out, **changes):
    values = dict(preset="small", out=str(out), steps=6, batch_size=2, leaves=4, photo_share=0.0, warmup=2,
                  checkpoint_every=2, log_every=1)
    return TrainConfig(**{**values, **changes})


def sharded(config, unused=False):
    "Shard the weights over the processes. `accelerate` offers that on accelerators only, so we set its switches."
    import accelerate
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    assert accelerator.is_fsdp2
    return accelerator


if __name__ == "__main__":
    small_preset()
    if "shard" in sys.argv: training.start_processes = sharded
    fit(config(**json.loads(sys.argv[1])), progress=False)
