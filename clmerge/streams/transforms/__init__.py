"""Stream transforms: what the data of a stream is turned into; docs/probes.md has one line on each."""

from clmerge.streams.transforms.fingerprinted import Fingerprinted
from clmerge.streams.transforms.poisoned import Poisoned
from clmerge.streams.transforms.repeated import Repeated
from clmerge.streams.transforms.transform import Change, ChangedImages, StreamTransform, changed, check_tasks, class_id
from clmerge.streams.transforms.triggers import Blended, Patch, Trigger

__all__ = [
    "Blended",
    "Change",
    "ChangedImages",
    "Fingerprinted",
    "Patch",
    "Poisoned",
    "Repeated",
    "StreamTransform",
    "Trigger",
    "changed",
    "check_tasks",
    "class_id",
]
