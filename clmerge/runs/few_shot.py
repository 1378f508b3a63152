"""Fine-tune a classifier on a few images, as the baseline of what carries task vectors over."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clmerge.training.module import ContinualClassifier
from clmerge.weights.swap import own_tensors

STEPS = 50


def fine_tuned(
    module: ContinualClassifier, batches: Sequence[tuple[Tensor, Tensor]], *, seed: int
) -> dict[str, Tensor]:
    """Return the weights after 50 steps of the module's own optimizer on all of the images at once.

    The head stays as it is, so that it serves every model of a comparison.

    Args:
        module: The classifier at its start; unchanged afterwards.
        batches: Images with labels.
        seed: Seed of dropout.

    Returns:
        The trained parameters of the backbone, by the module's own names.
    """
    device = next(module.parameters()).device
    trained = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and name.startswith("backbone.")
    }
    before = {name: tensor.detach().clone() for name, tensor in own_tensors(module).items()}
    was_training = module.training
    images = torch.cat([batch[0] for batch in batches]).to(device)
    labels = torch.cat([batch[1] for batch in batches]).to(device)
    optimizer = module.build_optimizer(list(trained.values()))
    module.eval()  # running statistics of a handful of images would be worse than those of the start
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**32)
        for _ in range(STEPS):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = module.loss(module(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
    found = {name: parameter.detach().clone() for name, parameter in trained.items()}
    with torch.no_grad():
        for name, tensor in own_tensors(module).items():
            tensor.copy_(before[name])
    for parameter in module.parameters():
        parameter.grad = None
    module.train(was_training)
    return found
