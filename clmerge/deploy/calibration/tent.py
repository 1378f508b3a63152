"""TENT: tune scale and shift of normalisation layers until the merged model is sure of its predictions."""

import math
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Adam
from typing_extensions import override

from clmerge.deploy.adapting import adaptation_losses
from clmerge.deploy.calibration.calibration import Calibration
from clmerge.deploy.calibration.images import VALIDATION, check_adaptation, kept_images, mixed_batches
from clmerge.deploy.learning import Request
from clmerge.merging import Entropy
from clmerge.merging.objectives import Heads
from clmerge.models.tuning.tangent import TangentModule
from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.training.module import ContinualClassifier
from clmerge.weights.batch_norm import estimated_statistics
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import folded, own_names
from clmerge.weights.swap import assign, named_tensors

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


class Tent(Calibration):
    """Tune scale and shift of normalisation layers by the entropy of predictions (TENT, Wang et al., arXiv 2006.10726).

    After every merge Adam lowers the entropy of the merged model's predictions on images of all tasks so far, and
    changes nothing but weights and biases of the image tower's normalisation layers. Running statistics of batch
    normalisation, where there are some, are estimated anew on these images before.

    The paper adapts to the images that are answered, batch by batch, with the statistics of the batch: what it says of
    an image depends on the others. Here the images are declared, the model is fixed afterwards, and it answers every
    image alone.

    Args:
        adaptation: Images of all tasks so far, and how many of each a step has; labels are not used.
        heads: Which classes compete: all ``seen`` so far, as when the model answers, or those of the image's ``task``.
        steps: Steps of Adam after every merge.
        lr: Learning rate; 1e-3 in the paper for small images.

    Raises:
        ValueError: If steps are negative or the learning rate is not positive.
    """

    name = "tent"
    sources: ClassVar[tuple[str, ...]] = ("2006.10726",)

    def __init__(
        self, *, adaptation: AdaptationData = VALIDATION, heads: Heads = "seen", steps: int = 50, lr: float = 1e-3
    ) -> None:
        if steps < 0 or not lr > 0:
            raise ValueError(f"expected steps of 0 or more and a positive lr, got {steps} and {lr}")
        self.adaptation = adaptation
        self.heads: Heads = Entropy(heads=heads).heads
        self.steps = steps
        self.lr = lr

    @property
    @override
    def data(self) -> str:
        return self.adaptation.told(labels=False)

    @override
    def check(self, module: ContinualClassifier, stream: Stream) -> None:
        check_adaptation(self.adaptation, stream, "Tent")
        if any(isinstance(part, TangentModule) for part in module.modules()):
            raise ValueError("expected a model with ordinary layers to tune for Tent, got one in its tangent space")
        if not _scales(module.backbone):
            raise ValueError(
                f"expected normalisation layers with weights for Tent, got none in {type(module.backbone).__name__}"
            )

    @override
    def calibrate(
        self, model: str, module: ContinualClassifier, data: StreamDataModule, task: int, seed: int
    ) -> dict[str, Tensor]:
        tasks, own = range(task + 1), own_names(module)
        device = next(module.parameters()).device
        kept = kept_images(self.adaptation, data, tasks)
        images = mixed_batches(kept, data.eval_batch_size, device, seed=derived_seed(seed, "statistics"))
        found = {own[name]: tensor for name, tensor in estimated_statistics(module, images).items()}
        assign(named_tensors(module, found, origin="a model under Tent"), found)
        request = Request(Entropy(heads=self.heads), list(tasks), 0, _no_expert)
        with folded(module) as network, eval_mode(network):
            network.requires_grad_(False)
            scales = _scales(network)
            optimizer = Adam([parameter.requires_grad_() for parameter in scales.values()], lr=self.lr)
            steps = adaptation_losses(self.adaptation, data, seed=seed)(network, request)
            for number in range(self.steps):
                optimizer.zero_grad()
                for loss in next(steps):
                    value = loss(network)
                    if not math.isfinite(float(value.detach())):
                        raise ValueError(
                            f"expected a finite entropy for Tent on {model}, got {float(value.detach())} at step "
                            f"{number + 1}; lower lr"
                        )
                    torch.autograd.backward(value)
                optimizer.step()
            # Those of a text tower take no part.
            return found | {own[name]: scale for name, scale in scales.items() if scale.grad is not None}

    @override
    def nbytes(self, module: ContinualClassifier, data: StreamDataModule, task: int, *, models: int = 1) -> int:
        return self.adaptation.nbytes(data, range(task + 1))


def _scales(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return weights and biases of normalisation layers by name."""
    return {
        f"{path}.{name}": parameter
        for path, part in network.named_modules()
        if isinstance(part, _NORMS)
        for name, parameter in part.named_parameters(recurse=False)
    }


def _no_expert(task: int) -> NoReturn:
    raise AssertionError("an entropy needs no expert")
