"""The former place of ``clmerge.results.metrics``, which imports in people's own code may name."""

from clmerge.results.metrics import *  # noqa: F403
