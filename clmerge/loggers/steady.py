"""Wrap a W&B run so that training continues, after one message, if W&B's helper process dies."""

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class SteadyRun:
    """Forward calls to a W&B run until its helper process dies, and ignore them afterwards.

    Args:
        run: The run.
    """

    def __init__(self, run: Any) -> None:
        self._part = _Part(run, _Line())

    def __getattr__(self, name: str) -> Any:
        if name == "_part":  # not set yet while an object is copied
            raise AttributeError(name)
        return getattr(self._part, name)


class _Line:
    """The connection to W&B, shared by a run and its parts."""

    def __init__(self) -> None:
        self.broken = False

    def call(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        from wandb.sdk.mailbox import MailboxClosedError

        if self.broken:
            return None
        try:
            return call(*args, **options)
        except (ConnectionError, MailboxClosedError) as error:
            import wandb

            self.broken = True
            print(
                f"W&B: its process is gone ({error or type(error).__name__}); the run goes on without it, and "
                "results and CSV are complete",
                file=sys.stderr,
                flush=True,
            )
            with suppress(ConnectionError, MailboxClosedError):
                wandb.teardown()  # otherwise W&B raises again when Python exits
            return None


class _Part:
    """The run, its summary or its configuration."""

    def __init__(self, part: Any, line: _Line) -> None:
        self._part = part
        self._line = line

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if name in ("summary", "config"):
            return _Part(value, self._line)
        if name == "keys" or not callable(value):
            return value
        return lambda *args, **options: self._line.call(value, *args, **options)

    def __getitem__(self, key: str) -> Any:
        return self._part[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._line.call(self._part.__setitem__, key, value)
