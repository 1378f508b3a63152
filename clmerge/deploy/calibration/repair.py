"""REPAIR: give the channels of a merged model the means and standard deviations that they have in the experts."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.calibration.channels import Channels, Spread, from_state, matched_layers, spreads, to_state
from clmerge.deploy.calibration.images import VALIDATION, batches_of, check_adaptation, kept_images, mixed_batches
from clmerge.models.tuning.tangent import TangentModule
from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.training.module import ContinualClassifier
from clmerge.weights.batch_norm import estimated_statistics
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import folded, own_names, state_of
from clmerge.weights.swap import assign, named_tensors

TARGETS = ("*.attn", "*.attn.qkv", "*.mlp.c_fc", "*.mlp.fc1")


class Repair(Calibration):
    """Repair the variance that merging takes from activations (REPAIR, Jordan et al., arXiv 2211.08403).

    When a task ends, mean and standard deviation of every channel are measured with its expert, on its own images, and
    averaged with those of the tasks before: two numbers per channel, however many tasks. After every merge the merged
    model's own are measured, averaged over the tasks in the same way, and weight and bias of the layer are rescaled so
    that both agree, layer after layer from the input on. With one task a merge that is its expert stays as it is.

    Channels are the inputs of attention (queries, keys, values) and of the MLPs' non-linearities in vision
    transformers. Running statistics of batch normalisation, where there are some, are estimated anew last; a network
    with batch normalisation needs no more than that. One pass over the images for every layer and merged model.

    Args:
        adaptation: Images of all tasks so far; labels are not used.
        targets: Glob patterns of the layers (linear, convolutional, or ``nn.MultiheadAttention`` for its input
            projection), of those with trained weights.

    Raises:
        ValueError: If there is no pattern.
    """

    name = "repaired"
    sources: ClassVar[tuple[str, ...]] = ("2211.08403",)
    observes: ClassVar[bool] = True

    def __init__(self, *, adaptation: AdaptationData = VALIDATION, targets: Sequence[str] = TARGETS) -> None:
        if not targets:
            raise ValueError("expected targets, glob patterns of layers, got none; leave them out for the default")
        self.adaptation = adaptation
        self.targets = targets
        self.goals: dict[str, Spread] = {}
        self.tasks = 0

    @property
    @override
    def data(self) -> str:
        return self.adaptation.told(labels=False)

    @override
    def check(self, module: ContinualClassifier, stream: Stream) -> None:
        check_adaptation(self.adaptation, stream, "Repair")
        if any(isinstance(part, TangentModule) for part in module.modules()):
            raise ValueError("expected a model with dense weights to rescale for Repair, got one in its tangent space")
        if not self._layers(module) and not any(isinstance(part, _BatchNorm) for part in module.modules()):
            raise ValueError(
                f"expected trained layers that match {list(self.targets)}, or batch normalisation, in "
                f"{type(module.backbone).__name__} for Repair, got none; name layers in targets"
            )

    def _layers(self, module: ContinualClassifier) -> list[Channels]:
        with folded(module) as network:
            return matched_layers(network, self.targets, module.trained_names)

    @override
    def observe(self, module: ContinualClassifier, data: StreamDataModule, task: int) -> None:
        images = kept_images(self.adaptation, data, range(task + 1))[task]
        device = next(module.parameters()).device
        with folded(module) as network, eval_mode(network):
            layers = matched_layers(network, self.targets, module.trained_names)
            found = spreads(layers, network, batches_of(images, data.eval_batch_size, device)) if layers else {}
        share = 1 / (self.tasks + 1)
        for name, one in found.items():
            old = self.goals.get(name, one)
            self.goals[name] = Spread(*(a + (b - a) * share for a, b in zip(old, one, strict=True)))
        self.goals = from_state(to_state(self.goals))  # as they are saved, so that a resumed run goes on alike
        self.tasks += 1

    @override
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        kept = kept_images(self.adaptation, data, range(task + 1))
        device = next(module.parameters()).device
        size = data.eval_batch_size
        new: dict[str, Tensor] = {}
        with folded(module) as network, eval_mode(network):
            layers = {one.name: one for one in matched_layers(network, self.targets, module.trained_names)}
            for name, goal in self.goals.items():
                passes = (spreads([layers[name]], network, batches_of(each, size, device)) for each in kept.values())
                new |= layers[name].match(Spread.average([found[name] for found in passes]), goal)
        values = state_of(module, new, {})
        assign(named_tensors(module, values, origin="a repaired model"), values)
        statistics = estimated_statistics(
            module, mixed_batches(kept, size, device, seed=derived_seed(seed, "statistics"))
        )
        own = own_names(module)
        return {**values, **{own[name]: tensor for name, tensor in statistics.items()}}

    @override
    def nbytes(self, module: ContinualClassifier, data: StreamDataModule, task: int, *, models: int = 1) -> int:
        channels = sum(len(getattr(one.layer, one.weight)) for one in self._layers(module))
        return 8 * channels + self.adaptation.nbytes(data, range(task + 1))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "goals": to_state(self.goals)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tasks, self.goals = int(state["tasks"]), from_state(state["goals"])
