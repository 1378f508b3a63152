"""The former place of ``clmerge.deploy.calibration``, which imports in people's own code may name."""

from clmerge.deploy.calibration import *  # noqa: F403
