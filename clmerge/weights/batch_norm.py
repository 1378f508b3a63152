"""Re-estimation of batch normalisation's running statistics for merged weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import folded, running_statistics


@torch.no_grad()
def estimated_statistics(module: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the running statistics of a module on some inputs, averaged over the batches.

    As in ``torch.optim.swa_utils.update_bn``, statistics are reset and averaged with equal weights (``momentum``
    None). Unlike there, layers other than batch normalisation stay in evaluation mode, because dropout would change
    the statistics. In a distributed run the statistics are averaged over the processes, each with its own batches.

    Args:
        module: The module with the weights to estimate for; called with the inputs, unchanged afterwards.
        batches: Inputs (batch, ...), on the module's device; at least two rows each, unless inputs have positions.

    Returns:
        Means and variances by dense name, on the CPU; empty for a module without batch normalisation.

    Raises:
        ValueError: If there is no batch.
    """
    with folded(module) as network, eval_mode(network):
        norms = [part for part in network.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
        if not norms:
            return {}
        before = [({name: buffer.clone() for name, buffer in norm.named_buffers()}, norm.momentum) for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            count = 0
            for inputs in batches:
                network(inputs)
                count += 1
            if not count:
                raise ValueError("expected images to estimate running statistics on, got none")
            return {name: _over_processes(tensor) for name, tensor in running_statistics(network).items()}
        finally:
            for norm, (buffers, momentum) in zip(norms, before, strict=True):
                norm.momentum = momentum
                for name, buffer in norm.named_buffers():
                    buffer.copy_(buffers[name])


def has_running_statistics(model: nn.Module) -> bool:
    """Return whether a model has batch normalisation that keeps running statistics."""
    return any(isinstance(part, _BatchNorm) and part.running_mean is not None for part in model.modules())


def check_callable(
    model: nn.Module, setting: str = "buffers='re-estimated'", others: str = "'latest', 'base' or 'mean'"
) -> None:
    """Raise a TypeError if a module has no ``forward``, which Lightning does not require.

    Args:
        model: The module.
        setting: The setting that calls it, for the message.
        others: The settings that do not.
    """
    if type(model).forward.__module__.split(".")[0] in ("lightning", "pytorch_lightning", "torch"):
        raise TypeError(
            f"expected {type(model).__name__} to have a forward(inputs), which {setting} calls with training images, "
            f"got none; define it, or choose {others}"
        )


def _over_processes(tensor: Tensor) -> Tensor:
    """Return the mean over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    total = tensor.to(device)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).cpu()
