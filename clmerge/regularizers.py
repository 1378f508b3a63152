"""The former place of ``clmerge.training.regularizers``, which imports in people's own code may name."""

from clmerge.training.regularizers import *  # noqa: F403
