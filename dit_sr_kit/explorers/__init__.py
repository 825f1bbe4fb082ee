"Things to step through: each explorer displays in a notebook, and `to_html` writes one file."
from dit_sr_kit.explorers.adafm import AdaFMExplorer
from dit_sr_kit.explorers.attention import AttentionExplorer
from dit_sr_kit.explorers.degradation import DegradationExplorer
from dit_sr_kit.explorers.schedule import ScheduleCurves, ScheduleExplorer, schedule_curves, straight_curves
from dit_sr_kit.explorers.spectrum import SpectrumExplorer
from dit_sr_kit.explorers.targets import TargetExplorer
from dit_sr_kit.explorers.trajectory import TrajectoryExplorer, compare

__all__ = ["AdaFMExplorer", "AttentionExplorer", "DegradationExplorer", "ScheduleCurves",
           "ScheduleExplorer", "SpectrumExplorer", "TargetExplorer", "TrajectoryExplorer", "compare",
           "schedule_curves", "straight_curves"]
