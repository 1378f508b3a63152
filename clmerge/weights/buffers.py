"""The policies for running statistics; apart from what computes them, so that naming one imports nothing heavy."""

from typing import Literal

Buffers = Literal["latest", "base", "mean", "re-estimated"]
"""Running statistics of a merged model: of the last task, of the base, their mean over the tasks, or new ones."""
