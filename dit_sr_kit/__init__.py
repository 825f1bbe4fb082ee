"Learn, and then do, diffusion-transformer super-resolution."
__version__ = "0.1.0"

# Loaded on first use, so that `import dit_sr_kit` stays fast and does not import torch.
_LAZY = {
    "SRPipeline": "pipelines",
    "DoSSRPipeline": "dossr_pipeline",
    "Trajectory": "trajectory",
    "DitSrError": "core", "ImageError": "core", "ConfigError": "core", "CheckpointError": "core",
    "WeightsUnavailable": "core", "MissingExtra": "core",
}


def __getattr__(name):
    if name in _LAZY:
        from importlib import import_module
        return getattr(import_module(f"dit_sr_kit.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'dit_sr_kit' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
