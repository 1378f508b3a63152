"""The policies for running statistics, in a module of their own so that importing them is cheap."""

from typing import Literal

Buffers = Literal["latest", "base", "mean", "re-estimated"]
"""Running statistics of a merged model: of the last task, of the base, mean over the tasks, or re-estimated."""
