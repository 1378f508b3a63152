"""Run commands that do not depend on each other at the same time: on this machine, or on a cluster of Ray."""

from clmerge.runs.launching.job import Job, RunJob
from clmerge.runs.launching.launcher import Launcher
from clmerge.runs.launching.local import LocalLauncher
from clmerge.runs.launching.ray import RayLauncher

__all__ = ["Job", "Launcher", "LocalLauncher", "RayLauncher", "RunJob"]
