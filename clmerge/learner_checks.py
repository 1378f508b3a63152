"""What a learner is refused for before anything is trained or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clmerge.callbacks.naming import check_settings
from clmerge.results import is_reference
from clmerge.weights.parametrization import merged_parameters

if TYPE_CHECKING:
    from clmerge.learner import Learner


def check_learner(learner: Learner) -> None:
    """Refuse settings that do not fit the stream, the model or each other.

    Args:
        learner: The learner, with all its parts.

    Raises:
        ValueError: If a merger needs a score and the stream holds no validation images out, or its settings fit
            neither the parameters nor the number of tasks; if ``epochs`` does not have one number per task; if
            branches are asked for that cannot be; or if images are replayed with a loss that leaves their classes out.
    """
    _check_training(learner)
    if taken := [name for name in learner.merge.mergers if is_reference(name)]:
        raise ValueError(f"expected another name for a merger than {taken[0]!r}, a reference model's name")
    if not learner.mergers:
        return
    needy = [name for name, merger in learner.mergers.items() if "score" in merger.requires]
    if needy and not all(len(learner.stream.dataset(task.index, "val")) for task in learner.tasks):
        raise ValueError(
            f"expected validation images for merger {needy[0]!r}, got a stream that holds none out; "
            "set stream.val_fraction above 0"
        )
    merged = merged_parameters(learner.module, learner.module.trained_names)
    check_settings(learner.mergers, merged, len(learner.tasks))
    if learner.branches > 1:
        check_settings({"branch_merger": learner.branch_merger}, merged, learner.branches * learner.rounds)


def _check_training(learner: Learner) -> None:
    if learner.data.replay and learner.module.loss_classes == "current":
        raise ValueError(
            f"expected loss_classes 'seen' or 'all' with data.replay={learner.data.replay}, got 'current', which "
            "leaves out the classes of earlier tasks"
        )
    if learner.epochs is not None and len(learner.epochs) != len(learner.tasks):
        raise ValueError(
            f"expected epochs for each of the {len(learner.tasks)} tasks, got {len(learner.epochs)} numbers"
        )
    branches, rounds = learner.branches, learner.rounds
    if branches < 1 or rounds < 1 or (rounds > 1 and branches == 1):
        raise ValueError(
            f"expected 1 branch or more and 1 round or more, of several branches each, got {branches} branches and "
            f"{rounds} rounds"
        )
    if branches > 1 and (wanted := learner.branch_merger.requires | learner.merge.required_statistics & {"adam"}):
        raise ValueError(f"expected mergers for branches that need task vectors alone, got one that needs {wanted}")
