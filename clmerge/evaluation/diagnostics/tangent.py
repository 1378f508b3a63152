"""Whether a task vector acts on the images of its own task: localisation in the tangent kernel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clmerge.evaluation.diagnostics.json_types import to_json
from clmerge.weights import State
from clmerge.weights.modes import eval_mode

_MEMORY = 2**30
_CUT = 1e-6  # eigenvalues below this share of the largest are rounding


def tangent_images(weights: State, wanted: int) -> int:
    """Return how many images of each of two tasks the gradients of which fit into a GiB.

    Args:
        weights: The base's weights by the module's names.
        wanted: At most so many.
    """
    return min(wanted, _MEMORY // (8 * sum(tensor.numel() for tensor in weights.values())))


def tangent_localisation(
    module: nn.Module,
    base: State,
    moved: State,
    own: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
) -> dict[str, float | int | None]:
    """Return how far the linearised change that a task vector makes is about its own task.

    After section 5 of arXiv 2305.12827. With ``J`` the gradients at theta_0 of every image's logit of its own class,
    ``g = J tau`` the linearised change, and ``v_i`` the eigenvectors of the kernel ``J J^T`` over the images of both
    tasks: ``localisation`` is ``sum_i (v_i g)^2 m_i / sum_i (v_i g)^2``, where ``m_i`` is the share of ``v_i`` on
    images of its own task. 1: only eigenfunctions of the own task are used, 0.5 (with as many images of both): none.
    ``alignment`` is ``||P tau|| / ||tau||`` with P the projection on the span of the gradients of all images: how much
    of the vector these images see at all. Memory holds one gradient for every image.

    Args:
        module: The classifier; unchanged.
        base: theta_0 by the module's names.
        moved: The task's expert by the same names.
        own: Images and global labels of the task.
        other: Those of another task.

    Returns:
        ``localisation``, ``alignment`` and ``images``, the number of images of both tasks; None where undefined.
    """
    rows = [_gradients(module, base, *part) for part in (own, other)]
    gradients = torch.cat(rows)
    tau = _flat({name: moved[name].to(base[name]) - base[name] for name in base})
    change = (gradients @ tau).double()
    kernel = (gradients @ gradients.T).double()
    values, vectors = torch.linalg.eigh(kernel)
    used = values > _CUT * values.max()
    values, vectors = values[used], vectors[:, used]
    energy = (vectors.T @ change).square()
    mass = vectors[: len(rows[0])].square().sum(dim=0)
    length = float(tau.double().norm())
    found: dict[str, Any] = to_json(
        {
            "localisation": float((energy * mass).sum() / energy.sum()) if energy.sum() > 0 else float("nan"),
            "alignment": float((energy / values).sum().sqrt()) / length if length else float("nan"),
            "images": len(gradients),
        }
    )
    return found


def _gradients(module: nn.Module, state: State, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of every image's logit of its own class, ``(N, P)``, float32 on the CPU."""
    device = next(module.parameters()).device
    leaves = {name: tensor.detach().to(device).requires_grad_() for name, tensor in state.items()}
    names: Sequence[str] = list(leaves)
    rows = []
    with eval_mode(module), torch.enable_grad():
        for image, label in zip(images, labels.tolist(), strict=True):
            logits = functional_call(module, leaves, (image.unsqueeze(0).to(device),))
            found = torch.autograd.grad(logits[0, label], [leaves[name] for name in names], allow_unused=True)
            filled = [torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, found, strict=True)]
            rows.append(_flat(dict(zip(names, filled, strict=True))))
    return torch.stack(rows)


def _flat(tensors: State) -> Tensor:
    return torch.cat([tensor.detach().float().flatten().cpu() for tensor in tensors.values()])
