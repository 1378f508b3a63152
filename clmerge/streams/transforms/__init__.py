"""Stream transforms: what the data of a stream is turned into; docs/probes.md has one line on each."""

from clmerge.streams.transforms.changes import ImageChange, Rotation, Unchanged
from clmerge.streams.transforms.corrupted import Corrupted
from clmerge.streams.transforms.corruptions import Corruption
from clmerge.streams.transforms.domains import Domains
from clmerge.streams.transforms.few_shot import FewShot
from clmerge.streams.transforms.fingerprinted import Fingerprinted
from clmerge.streams.transforms.held_out import HeldOut
from clmerge.streams.transforms.imbalanced import Imbalanced
from clmerge.streams.transforms.label_noise import LabelNoise
from clmerge.streams.transforms.poisoned import Poisoned
from clmerge.streams.transforms.repeated import Repeated
from clmerge.streams.transforms.transform import Change, ChangedImages, StreamTransform, changed, check_tasks, class_id
from clmerge.streams.transforms.triggers import Blended, Patch, Trigger

__all__ = [
    "Blended",
    "Change",
    "ChangedImages",
    "Corrupted",
    "Corruption",
    "Domains",
    "FewShot",
    "Fingerprinted",
    "HeldOut",
    "ImageChange",
    "Imbalanced",
    "LabelNoise",
    "Patch",
    "Poisoned",
    "Repeated",
    "Rotation",
    "StreamTransform",
    "Trigger",
    "Unchanged",
    "changed",
    "check_tasks",
    "class_id",
]
