"""Probes: numbers about a model beside its accuracies; docs/probes.md has one line on each."""

from clmerge.evaluation.probes.attack_success import AttackSuccess
from clmerge.evaluation.probes.calibration_error import CalibrationError
from clmerge.evaluation.probes.communication import CommunicatedBytes
from clmerge.evaluation.probes.corruption_accuracy import CorruptionAccuracy
from clmerge.evaluation.probes.fingerprint_hits import FingerprintHits
from clmerge.evaluation.probes.forget_control import ForgetControl
from clmerge.evaluation.probes.held_out_accuracy import HeldOutAccuracy
from clmerge.evaluation.probes.membership import MembershipInference
from clmerge.evaluation.probes.novel_class_accuracy import NovelClassAccuracy
from clmerge.evaluation.probes.pgd_accuracy import PGDAccuracy
from clmerge.evaluation.probes.probe import (
    NO_TASK,
    TEST,
    AccuracyProbe,
    ImageProbe,
    Occasion,
    Probe,
    Seen,
    View,
    WeightProbe,
    check_probes,
)
from clmerge.evaluation.probes.watermark_bits import WatermarkBits
from clmerge.results.measured import Measured

__all__ = [
    "NO_TASK",
    "TEST",
    "AccuracyProbe",
    "AttackSuccess",
    "CalibrationError",
    "CommunicatedBytes",
    "CorruptionAccuracy",
    "FingerprintHits",
    "ForgetControl",
    "HeldOutAccuracy",
    "ImageProbe",
    "Measured",
    "MembershipInference",
    "NovelClassAccuracy",
    "Occasion",
    "PGDAccuracy",
    "Probe",
    "Seen",
    "View",
    "WatermarkBits",
    "WeightProbe",
    "check_probes",
]
