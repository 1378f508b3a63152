"""Calibrations: adjust a merged model after merging, with a little data kept from earlier tasks."""

from clmerge.deploy.calibration.alignment import HeadAlignment
from clmerge.deploy.calibration.calibrated import CalibratedModels
from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.calibration.gaussians import ClassGaussians
from clmerge.deploy.calibration.repair import Repair
from clmerge.deploy.calibration.rotation import HeadRotation
from clmerge.deploy.calibration.sample_tuning import SampleTuning
from clmerge.deploy.calibration.surgery import Surgery
from clmerge.deploy.calibration.tent import Tent

__all__ = [
    "CalibratedModels",
    "Calibration",
    "ClassGaussians",
    "HeadAlignment",
    "HeadRotation",
    "Repair",
    "SampleTuning",
    "Surgery",
    "Tent",
]
