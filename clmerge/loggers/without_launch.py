"""Start W&B without the part of it that starts jobs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace


@contextmanager
def without_launch() -> Iterator[None]:
    """Spare ``wandb.init`` the import of W&B Launch and its API, which takes as long as importing Lightning.

    It looks there for inputs that a program has staged. A program that has done so has imported Launch, and is left
    alone.
    """
    name = "wandb.sdk.launch.inputs.internal"
    if "wandb.sdk.launch" in sys.modules:
        yield
        return
    nothing_staged = ModuleType(name)
    nothing_staged.__dict__["StagedLaunchInputs"] = lambda: SimpleNamespace(apply=lambda run: None)
    sys.modules[name] = nothing_staged
    try:
        yield
    finally:
        sys.modules.pop(name, None)
