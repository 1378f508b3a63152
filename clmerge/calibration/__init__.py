"""What may be done to a merged model after merging, with a little that was kept of the old tasks."""

from clmerge.calibration.alignment import HeadAlignment
from clmerge.calibration.calibrated import CalibratedModels
from clmerge.calibration.calibration import Calibration
from clmerge.calibration.gaussians import ClassGaussians
from clmerge.calibration.sample_tuning import SampleTuning

__all__ = ["CalibratedModels", "Calibration", "ClassGaussians", "HeadAlignment", "SampleTuning"]
