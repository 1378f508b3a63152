"""Measure probes of several predictors: on images beside the test images, and on weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning.pytorch import Trainer

from clmerge.deploy.predictors import Predictor
from clmerge.evaluation.evaluator import Evaluator, Looks
from clmerge.evaluation.probes.probe import TEST, ImageProbe, Occasion, Probe, Seen, WeightProbe
from clmerge.models import Classifier
from clmerge.results.measured import Measured
from clmerge.results.results import Results
from clmerge.streams import StreamDataModule
from clmerge.streams.images import ImageDataset
from clmerge.streams.plan import SplitPlan
from clmerge.weights.task_vector import State

Findings = dict[str, Measured]
"""What probes found about one model, by their names."""


@dataclass(frozen=True)
class Probing:
    """Probes, and what they may look at beside images.

    Attributes:
        probes: The probes; those of the last task alone are left out before it.
        occasion: When the models are looked at.
        weights: Returns the merged parameters of a model, dense, by its name; models that are no one set of weights
            are missing.
        base: theta_0 by the same names.
    """

    probes: Sequence[Probe]
    occasion: Occasion
    weights: Mapping[str, Callable[[], State]] = field(default_factory=dict)
    base: State = field(default_factory=dict)

    @cached_property
    def due(self) -> list[Probe]:
        """The probes that are measured on this occasion."""
        return [probe for probe in self.probes if self.occasion.last or probe.after == "every"]

    @cached_property
    def riding(self) -> list[ImageProbe]:
        """The probes that look at the test images as they are."""
        return [one for one in self.due if isinstance(one, ImageProbe) and type(one).parts is ImageProbe.parts]


def needs_gradient(probes: Sequence[Probe]) -> bool:
    """Return whether a Trainer for these probes must allow gradients."""
    return any(isinstance(probe, ImageProbe) and probe.needs_gradient for probe in probes)


def measure(
    trainer: Trainer,
    module: Classifier,
    predictors: Mapping[str, Predictor],
    data: StreamDataModule,
    probing: Probing,
    seen: Looks,
) -> dict[str, Findings]:
    """Return what the probes found about every predictor.

    Args:
        trainer: A Trainer without a MergeCallback.
        module: The classifier; unchanged afterwards.
        predictors: Predictors by name.
        data: Provides images of all tasks.
        probing: The probes.
        seen: What those that look at the test images have seen.

    Returns:
        Findings by predictor; a predictor lacks probes that it is not made for.
    """
    occasion = probing.occasion
    found = _of_weights(probing, predictors)
    for probe in probing.due:
        if not isinstance(probe, ImageProbe):
            continue
        looks: dict[str, dict[str, Seen]] = {name: {} for name in predictors}
        if probe in probing.riding:
            for name in predictors:
                looks[name][TEST] = seen[name][probe.name]
        else:
            for part, plans in probe.parts(data.stream).items():
                for name, each in _look(trainer, module, predictors, data, probe, part, plans, occasion).items():
                    looks[name][part] = each
        for name, parts in looks.items():
            found[name][probe.name] = probe.summary(parts, occasion)
    order = [probe.name for probe in probing.due]
    return {name: {probe: each[probe] for probe in order if probe in each} for name, each in found.items()}


def add_findings(results: Results, model: str, findings: Findings, probes: Sequence[Probe]) -> None:
    """Add what probes found about a model to its results.

    Args:
        results: The results, with the model's row.
        model: Name of the model.
        findings: The findings; those of some probes may be missing.
        probes: The probes.
    """
    for probe in probes:
        if probe.name in findings:
            results.add_probe(model, probe.name, findings[probe.name], **probe.described())


def _of_weights(probing: Probing, names: Iterable[str]) -> dict[str, Findings]:
    """Show the weights of every model, computed once and one model at a time, to the probes of weights."""
    probes = [probe for probe in probing.due if isinstance(probe, WeightProbe)]
    found: dict[str, Findings] = {name: {} for name in names}
    for name in found.keys() & probing.weights.keys() if probes else ():
        weights = probing.weights[name]()
        found[name] = {probe.name: probe.measure(weights, probing.base, probing.occasion) for probe in probes}
    return found


def _look(
    trainer: Trainer,
    module: Classifier,
    predictors: Mapping[str, Predictor],
    data: StreamDataModule,
    probe: ImageProbe,
    part: str,
    plans: Mapping[int, SplitPlan],
    occasion: Occasion,
) -> dict[str, Seen]:
    """Show one part of a probe's images to all predictors."""
    images = {
        task: ImageDataset(plan, data.eval_transform, label=f"images {part!r} of {type(probe).__name__}")
        for task, plan in plans.items()
        if len(plan.indices)
    }
    if not images:
        raise ValueError(f"expected images for {type(probe).__name__}, got none in its part {part!r}")
    evaluator = Evaluator(
        module,
        predictors,
        occasion.task_classes,
        occasion.num_classes,
        probes=[probe],
        part=part,
        reading=occasion.reading,
    )
    try:
        trainer.test(evaluator, dataloaders=data.dataloader_of(images), verbose=False)
    finally:
        evaluator.restore()
    return {name: found[probe.name] for name, found in evaluator.seen().items()}
