"""The former place of ``clmerge.evaluation.diagnostics``, which imports in people's own code may name."""

from clmerge.evaluation.diagnostics import *  # noqa: F403
