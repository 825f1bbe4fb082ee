"Things to step through: each explorer displays in a notebook, and `to_html` writes one file."
from dit_sr_kit.explorers.spectrum import SpectrumExplorer
from dit_sr_kit.explorers.trajectory import TrajectoryExplorer, compare

__all__ = ["SpectrumExplorer", "TrajectoryExplorer", "compare"]
