"""Samplers with one contract: ResShift, DoSSR, JiT's flow and flow matching."""
from dit_sr_kit.schedulers.common import SchedulerStep, convert_prediction
from dit_sr_kit.schedulers.dossr import DoSSRScheduler
from dit_sr_kit.schedulers.flow import FlowMatchScheduler, JiTFlowScheduler
from dit_sr_kit.schedulers.resshift import ResShiftScheduler

__all__ = ["DoSSRScheduler", "FlowMatchScheduler", "JiTFlowScheduler", "ResShiftScheduler", "SchedulerStep",
           "convert_prediction"]
