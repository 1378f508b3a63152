"""The calibrated models of a run: every merged model under every calibration."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.calibration.operated import copy_with, split_state
from clmerge.deploy.kept_state import load_states, states_of, take_of_rank_zero
from clmerge.deploy.predictors import Predictor
from clmerge.distributed import of_rank_zero
from clmerge.results.results import ADAPTERS, HEAD
from clmerge.streams import Stream, StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.training.module import ContinualClassifier
from clmerge.weights.parametrization import folded, renew
from clmerge.weights.swap import swapped


class CalibratedModels:
    """Collect the data of the calibrations of a run, and apply them.

    A calibrated model depends only on the merged model, the collected data and the seed: it is recomputed when it is
    needed, and a resumed run computes the same one.

    Args:
        calibrations: The calibrations, with different names.
        module: The classifier.
        data: Its data module.
        stream: The stream that it serves.
        seed: Seed of the run.

    Attributes:
        seconds: Duration of the last computation of every calibrated model, by name.

    Raises:
        ValueError: If two calibrations have the same name, or one cannot calibrate the classifier on the stream.
    """

    def __init__(
        self,
        calibrations: Sequence[Calibration],
        module: ContinualClassifier,
        data: StreamDataModule,
        stream: Stream,
        *,
        seed: int,
    ) -> None:
        self.calibrations = {one.name: one for one in calibrations}
        if len(self.calibrations) < len(calibrations):
            raise ValueError(f"expected calibrations of different kinds, got {[one.name for one in calibrations]}")
        for one in calibrations:
            one.check(module, stream)
        self.module = module
        self.data = data
        self.seed = seed
        self.seconds: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.calibrations)

    def collect(
        self,
        merged: Mapping[str, Mapping[str, Tensor]],
        task: int,
        device: torch.device,
        *,
        expert: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, int]:
        """Collect the calibrations' data of a task that was just merged.

        Args:
            merged: Merger -> weights of the merged model by the module's own names.
            task: Index of the task.
            device: Device for the computation; the module stays there.
            expert: Returns the weights of the task's un-merged model by the module's own names.

        Returns:
            Bytes of the collected data, by ``calibration.NAME``.
        """
        self.module.to(device)
        if observing := [one for one in self.calibrations.values() if one.observes]:
            with swapped(self.module, expert()):
                for one in observing:
                    one.observe(self.module, self.data, task)
        for model, state in merged.items():
            with swapped(self.module, state):
                for one in self.calibrations.values():
                    one.collect(model, self.module, self.data, task)
        for one in self.calibrations.values():
            take_of_rank_zero(one)
        return {
            f"calibration.{name}": one.nbytes(self.module, self.data, task, models=len(merged))
            for name, one in self.calibrations.items()
        }

    def models(
        self, merged: Mapping[str, Mapping[str, Tensor]], task: int, device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """Return ``MERGER+NAME`` -> weights of the calibrated model by the module's own names.

        Args:
            merged: Merger -> weights of the merged model by the module's own names.
            task: Index of the task that was merged last.
            device: Device for the computation.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for model, state in merged.items():
            for name, one in self.calibrations.items():
                started = time.perf_counter()
                twin = copy_with(self.module, state).to(device)
                renew(twin, seed=self.seed, task=task)  # inner parameters that training left must not matter
                seed = derived_seed(self.seed, "calibration", name, task)
                changed = one.calibrate(model, twin, self.data, task, seed)
                changed = {key: value.detach().cpu() for key, value in changed.items()}
                found[f"{model}+{name}"] = {**state, **of_rank_zero(changed)}
                self.seconds[f"{model}+{name}"] = time.perf_counter() - started
        return found

    def predictors(
        self, merged: Mapping[str, Mapping[str, Tensor]], task: int, device: torch.device
    ) -> dict[str, Predictor]:
        """Return ``MERGER+NAME`` -> predictor of the calibrated model; arguments as for ``models``."""
        return {
            name: self.calibrations[name.rpartition("+")[2]].predictor(copy_with(self.module, state), state)
            for name, state in self.models(merged, task, device).items()
        }

    def final(
        self, merged: Mapping[str, Mapping[str, Tensor]], task: int, device: torch.device
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield ``MERGER+NAME`` with the dense weights of its backbone, then ``MERGER+NAME-head`` with its head.

        The head is left out if it is never trained. ``MERGER+NAME-adapters`` has those of ``Surgery``.
        """
        for name, state in self.models(merged, task, device).items():
            twin = copy_with(self.module, state)
            with folded(twin.backbone):
                yield name, dict(twin.backbone.model.state_dict())
            if not twin.head.open_vocabulary:
                yield f"{name}-{HEAD}", dict(twin.head.state_dict())
            if adapters := split_state(state)[1]:
                yield f"{name}-{ADAPTERS}", adapters

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: tensors and primitives."""
        return states_of(self.calibrations)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state_dict``.

        Raises:
            RuntimeError: If the state belongs to other calibrations.
        """
        load_states(self.calibrations, state, "calibrations")
