"""Choose the merged model to evaluate, and warn if it is not what a user would expect."""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from clmerge.callbacks.evaluation_swap import EvaluationSwap
from clmerge.deploy.recorded_merge import RecordedMerge
from clmerge.deploy.running_merge import RunningMerge
from clmerge.results.results import EXPERT


class MergedEvaluation(RecordedMerge, EvaluationSwap):
    """Swap in the deployed merged model, or that of the ``merged`` block around a run; arguments as ``RunningMerge``.

    While nothing is merged here, what a checkpoint holds is evaluated, and without one the module as it is.
    """

    _restored: Mapping[str, Any] = {}  # what the checkpoint of this run holds
    _warned: frozenset[str] = frozenset()

    @override
    def _evaluation_state(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor] | None:
        shown = self._inside or self.deploy
        if shown == EXPERT:
            return None
        merge = self._evaluated()
        if not merge.num_tasks:
            if trainer.ckpt_path is not None:
                warnings.warn(
                    f"expected merged tasks in this callback or in {trainer.ckpt_path}, got none (a checkpoint that "
                    "was saved with save_weights_only has none): its un-merged weights are evaluated",
                    RuntimeWarning,
                    stacklevel=2,
                )
            else:
                self._warn_once(
                    f"expected merged tasks in this MergeCallback, got none yet: {type(pl_module).__name__} is "
                    "evaluated as it is; call load_checkpoint(path) of the callback, or fit, first"
                )
            return None
        if merge.mergers[shown].task_views:
            self._warn_once(
                f"merger {shown!r} has a model per task, and what is evaluated is its one model for inputs of unknown "
                f"task; merge.mergers[{shown!r}].task_view(task) is a task's own vector, and clmerge fit and clmerge "
                "compare evaluate those"
            )
        state = merge.state_with(merge.merged_vector(shown), pl_module, merger=shown)
        if trainer.ckpt_path is not None and not self._swaps:
            rest = sum(name not in state for name in pl_module.state_dict())
            rank_zero_info(
                f"MergeCallback: evaluating the merged model ({shown}) of {merge.num_tasks} tasks; {rest} tensors that "
                f"are not merged come from {trainer.ckpt_path}"
            )
        return state

    def _warn_once(self, message: str) -> None:
        """Warn, unless this callback has said so before."""
        if message not in self._warned:
            self._warned |= {message}
            rank_zero_warn(message)

    def _evaluated(self) -> RunningMerge:
        """Return what is evaluated: this callback, or while it has merged nothing, what the checkpoint holds."""
        return self.as_of(self._restored) if self._restored and not self.num_tasks else self
