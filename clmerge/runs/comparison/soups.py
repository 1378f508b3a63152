"""Average the final models of several runs: uniform and greedy soups, the ensemble, and how the models differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from clmerge.deploy.predictors import LogitMean, Merged, Predictor
from clmerge.evaluation.diversity import ensemble_terms, locality
from clmerge.merging import Merger
from clmerge.names import tell
from clmerge.results.results import SETTINGS
from clmerge.runs.comparison.refold import Refold, told_rule
from clmerge.runs.comparison.row_cache import RowCache, make_row
from clmerge.runs.stored_run import StoredRun
from clmerge.training.trajectory import Weights, mean_of
from clmerge.weights.batch_norm import estimated_statistics
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import own_names, running_statistics
from clmerge.weights.swap import swapped


@dataclass(frozen=True)
class Member:
    """The final model of one run.

    Attributes:
        run: Name of the run.
        identity: The run's hash, the rule, and what that looks at.
        vector: Its weights minus theta_0, by dense name.
        head: The trained head, by the module's names.
    """

    run: str
    identity: str
    vector: Weights
    head: Weights


class Soups:
    """The soups of the final models of several runs, for every merger; runs are added one at a time.

    Members are ordered by their accuracy on validation images. The greedy soup takes the best, and every next one with
    which the average's validation accuracy does not fall (Wortsman et al., arXiv 2203.05482; DiWA, arXiv 2205.09739);
    the uniform soup has all of them, and so has the ensemble, which averages logits. Test images are looked at once,
    with these three. A trained head is averaged with the weights, and running statistics are estimated on the training
    images of all tasks.

    The final models of all runs are in memory until the end.
    """

    def __init__(self) -> None:
        self._members: dict[str, list[Member]] = {}
        self._common: tuple[str, dict[str, Any]] | None = None

    def check(self, run: StoredRun, mergers: Mapping[str, Merger]) -> None:
        """Refuse a run whose models have no common soup with those checked before, before anything is computed.

        Args:
            run: The run.
            mergers: Mergers by name.

        Raises:
            ValueError: If it differs in base, stream or head, held no validation images out, tasks are left out, or a
                merger has weights per task.
        """
        if told := [name for name, merger in mergers.items() if merger.task_views]:
            raise ValueError(f"expected mergers of one model for --soup, got {told[0]!r}, which has one for every task")
        if not run.has_validation:
            raise ValueError(
                f"expected validation images for --soup, which orders the runs by them, got none in {run.folder.path}: "
                "train with stream.val_fraction above 0"
            )
        if len(run.kept) < len(run.tasks):
            raise ValueError("expected --soup, which averages final models, or --without, got both: leave one out")
        facts = {
            "base model": run.bank.base,
            "stream": run.config["stream"],
            "head": run.config["model"]["head"],
        }
        if self._common is None:
            self._common = (str(run.folder.path), facts)
        path, common = self._common
        for what, theirs in common.items():
            if facts[what] != theirs:
                raise ValueError(
                    f"expected the {what} of {path} in {run.folder.path} for --soup, got another: only models of one "
                    "base and one stream have a common average"
                )

    def add(self, run: StoredRun, mergers: Mapping[str, Merger]) -> None:
        """Merge a run's tasks with every merger, and keep the final models.

        Args:
            run: The run.
            mergers: Mergers by name, with the settings chosen for the run.
        """
        refold = Refold(run, mergers)
        for task in range(len(run.tasks)):
            refold.fold(task)
        run.enter(len(run.tasks) - 1)
        learned = not run.module.head.open_vocabulary
        head = {f"head.{name}": _kept(tensor) for name, tensor in run.module.head.state_dict().items() if learned}
        for name, merger in mergers.items():
            vector = {key: _kept(tensor) for key, tensor in refold.merge.merged_vector(name).items()}
            identity = f"{run.identity} {told_rule(run, merger)}"
            self._members.setdefault(name, []).append(Member(run.name, identity, vector, head))

    def finish(self, run: StoredRun, cache: RowCache) -> list[dict[str, Any]]:
        """Return the soups of every merger, as ``results.json`` has them.

        Args:
            run: One of the runs, whose module and images are used.
            cache: Keeps what was found on test images.
        """
        return [self._soups(name, members, run, cache) for name, members in self._members.items()]

    def _soups(self, merger: str, members: Sequence[Member], run: StoredRun, cache: RowCache) -> dict[str, Any]:
        run.enter(len(run.tasks) - 1)
        mixes = _Mixes(run, members)
        scores = [mixes.score([index]) for index in range(len(members))]
        ranked = sorted(range(len(members)), key=lambda index: -scores[index])
        greedy, best = ranked[:1], scores[ranked[0]]
        for index in ranked[1:]:
            if (score := mixes.score([*greedy, index])) >= best:
                greedy, best = [*greedy, index], score
        every = list(range(len(members)))
        tell(f"{merger}: {len(greedy)} of {len(members)} runs are in the greedy soup")
        chosen = {"uniform": every, "greedy": sorted(greedy)}
        states = {kind: mixes.state(indices) for kind, indices in chosen.items()}
        predictors: dict[str, Predictor] = {kind: Merged(state) for kind, state in states.items()}
        predictors["ensemble"] = LogitMean([mixes.state([index]) for index in every])
        told = [member.identity for member in members]
        keys = {kind: cache.key(str(told), f"soup {kind} {chosen.get(kind, every)}", "test", []) for kind in predictors}
        if missing := {kind: one for kind, one in predictors.items() if keys[kind] not in cache}:
            rows = run.evaluate_again(f"soups of {merger}, test images", missing, len(run.tasks) - 1)
            cache.add({keys[kind]: make_row(row) for kind, row in rows.items()})
        found = {
            kind: {
                "members": chosen.get(kind, every),
                "score": mixes.score(chosen[kind]) if kind in chosen else None,
                **{setting: cache[keys[kind]][setting] for setting in SETTINGS},
            }
            for kind in predictors
        }
        probabilities, labels = mixes.probabilities([[index] for index in every] + [every])
        terms = ensemble_terms(probabilities[:-1], probabilities[-1], labels)
        vectors = [{**member.vector, **_floating(member.head)} for member in members]
        return {
            "model": merger,
            "runs": [member.run for member in members],
            "scores": scores,
            "best": ranked[0],
            "soups": found,
            "terms": {**terms, "locality": locality(vectors), "images": len(labels)},
        }


class _Mixes:
    """Averages of members, as weights of one run's module."""

    def __init__(self, run: StoredRun, members: Sequence[Member]) -> None:
        self.run, self.members = run, members

    def state(self, indices: Sequence[int]) -> Weights:
        """Return the average of some members, by the module's names."""
        run, chosen = self.run, [self.members[index] for index in sorted(indices)]
        vector = mean_of([member.vector for member in chosen])
        head = {**chosen[0].head, **mean_of([_floating(member.head) for member in chosen])}
        state = {**run.weights_with(vector), **head}
        if running_statistics(run.module):
            images = chain.from_iterable(run.images(task) for task in range(len(run.tasks)))
            with swapped(run.module, state):
                found = estimated_statistics(run.module, images)
            state |= {own_names(run.module)[name]: tensor for name, tensor in found.items()}
        return state

    def score(self, indices: Sequence[int]) -> float:
        """Return the validation accuracy of the average of some members."""
        with swapped(self.run.module, self.state(indices)):
            return self.run.score(self.run.kept)

    @torch.no_grad()
    def probabilities(self, choices: Sequence[Sequence[int]]) -> tuple[list[Tensor], Tensor]:
        """Return the probabilities that averages give to the classes of validation images, and the true classes."""
        run, found, labels = self.run, [], torch.empty(0)
        for indices in choices:
            parts, truth = [], []
            with swapped(run.module, self.state(indices)), eval_mode(run.module):
                for images, own, tasks in run.data.eval_dataloader("val", run.kept):
                    logits = run.module(images.to(run.device)).double().cpu()
                    if run.evaluation == "task_aware":
                        logits = _only(logits, [run.task_classes[task] for task in tasks.tolist()])
                    parts.append(logits.softmax(dim=1))
                    truth.append(own.cpu())
            found.append(torch.cat(parts))
            labels = torch.cat(truth)
        return found, labels


def _only(logits: Tensor, classes: Sequence[Sequence[int]]) -> Tensor:
    """Return logits in which the classes of other tasks than the image's cannot win."""
    masked = torch.full_like(logits, -torch.inf)
    for row, (own, kept) in enumerate(zip(logits, classes, strict=True)):
        masked[row, list(kept)] = own[list(kept)]
    return masked


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _floating(tensors: Mapping[str, Tensor]) -> Weights:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
