"""Save the final models of a run as files that load strictly into the backbone."""

from collections.abc import Mapping, Sequence

from clmerge.callbacks import MergeCallback
from clmerge.models import Classifier
from clmerge.results.results import EXPERT, HEAD
from clmerge.results.run_folder import RunFolder
from clmerge.weights import save_tensors
from clmerge.weights.parametrization import folded
from clmerge.weights.task_vector import State


def save_models(
    run: RunFolder,
    module: Classifier,
    merge: MergeCallback,
    mergers: Sequence[str],
    more: Mapping[str, State],
) -> None:
    """Write dense weights of the backbone under every merger to ``model/``, and the head if it was trained.

    Args:
        run: The run folder.
        module: The classifier with the weights of the last task.
        merge: The callback with the base and the mergers.
        mergers: Names of the mergers.
        more: Tensors of further files, by file name.
    """
    prefix = "backbone.model."
    with folded(module.backbone):
        whole = dict(module.backbone.model.state_dict())
    for name in mergers:
        merged = {key.removeprefix(prefix): value for key, value in merge.merged_state(name).items()}
        metadata = {"merger": repr(merge.mergers[name]), "tuning": repr(module.tuning)}
        save_tensors(run.model(name), {**whole, **merged}, metadata=metadata)
    for name, tensors in more.items():
        save_tensors(run.model(name), tensors)
    if merge.deploy == EXPERT:
        save_tensors(run.model(EXPERT), whole, metadata={"merger": "none: the last task's un-merged model"})
    if not module.head.open_vocabulary:
        save_tensors(run.model(HEAD), module.head.state_dict())
