"""A module in its tangent space: the first-order expansion around frozen weights, linear in the trained tangent."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from typing_extensions import override

from clmerge.models.tuning.closed_forms import ClosedForms, load_forward_mode
from clmerge.models.tuning.recompute import recompute_blocks
from clmerge.weights.parametrized import Parametrized
from clmerge.weights.selection import select_parameters
from clmerge.weights.task_vector import State, TaskVector, apply_task_vector, task_vector


class TangentModule(Parametrized):
    """``f(x; theta_0) + J(x; theta_0) tau`` with ``tau`` trained from zero (Ortiz-Jimenez et al., arXiv 2305.12827).

    ``base`` is frozen at ``theta_0``; ``tangent`` has one parameter under the same name for every trained one. One
    forward pass computes value and Jacobian-vector product, and only the tangents get gradients. The change of the
    output is linear in ``tau``: for the sum of two task vectors, their changes of the output add up.

    Args:
        base: The module to linearize; it is frozen. Only its parameters that require gradients get a tangent.
        scope: Glob patterns of parameters that get a tangent (``"*.attn.*"``); the others are constant. Default all.
        decay_to: Target of the optimizer's weight decay: the ``base`` weights (``tau`` is trained), or ``zero``
            (``theta_0 + tau`` is trained), as in ordinary fine-tuning.
        evaluate: The model in evaluation mode: ``linear``, or post hoc the ``nonlinear`` one with the weights
            ``theta_0 + tau``.
        checkpointing: Whether the activations inside of each block (the members of the largest list of modules) are
            recomputed in the backward pass instead of being kept.

    Raises:
        ValueError: If a pattern matches nothing, or with ``checkpointing`` for a module without a list of blocks.
        RuntimeError: In ``forward``, if the base is no longer frozen.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> linear = TangentModule(net)
        >>> [name for name, parameter in linear.named_parameters() if parameter.requires_grad]
        ['tangent.weight', 'tangent.bias']
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        scope: Sequence[str] | None = None,
        decay_to: Literal["base", "zero"] = "base",
        evaluate: Literal["linear", "nonlinear"] = "linear",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        load_forward_mode()
        chosen = select_parameters(base, scope)
        self.base = base.requires_grad_(False)
        self.tangent = nn.Module()
        for name, parameter in chosen.items():
            start = parameter.detach().clone() if decay_to == "zero" else torch.zeros_like(parameter)
            self._place(name, nn.Parameter(start))
        self.decay_to = decay_to
        self.evaluate = evaluate
        if checkpointing:
            recompute_blocks(base)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus its change along the tangent."""
        base, tau = self._base(), self.tau()
        if any(parameter.requires_grad for parameter in base.values()):
            raise RuntimeError(
                "expected a frozen base in a TangentModule, got trainable parameters in it; train its tangent, "
                "and leave base.requires_grad_(True) out"
            )
        if self.evaluate == "nonlinear" and not self.training:
            moved = {name: base[name] + tangent for name, tangent in tau.items()}
            output: Tensor = functional_call(self.base, moved, args, kwargs)
            return output

        statistics = dict(self.base.named_buffers()) if self.training else {}

        def compute(weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
            buffers = {name: buffer.clone() for name, buffer in statistics.items()}
            with ClosedForms():
                return functional_call(self.base, weights | buffers, args, kwargs), buffers

        expansion: Any = jvp(compute, ({name: base[name] for name in tau},), (tau,), has_aux=True)
        value, change, updated = expansion
        for name, buffer in statistics.items():  # of normalisation: a function under jvp may not write to them itself
            buffer.copy_(updated[name])
        # Autocast returns half precision, in which adding a small change could round it away.
        autocast = torch.is_autocast_enabled(value.device.type)
        result: Tensor = value.float() + change.float() if autocast else value + change
        return result

    def tau(self) -> dict[str, Tensor]:
        """Return the tangents of the base's parameters by name; differentiable."""
        trained: dict[str, Tensor] = dict(self.tangent.named_parameters())
        if self.decay_to == "base":
            return trained
        base = self._base()
        return {name: theta - base[name] for name, theta in trained.items()}

    def change(self) -> dict[str, Tensor]:
        """Return the change of the dense weights, by dense name; differentiable."""
        return self.tau()

    def _base(self) -> dict[str, Tensor]:
        return dict(self.base.named_parameters())

    @override
    def names(self) -> list[str]:
        return [name for name, _ in self.tangent.named_parameters()]

    @override
    def inner(self) -> list[str]:
        return [f"tangent.{name}" for name in self.names()]

    @override
    def dense(self) -> dict[str, Tensor]:
        base = self._base()
        return {name: (base[name] + tau).to(base[name].dtype) for name, tau in self.change().items()}

    @override
    def delta(self, base: State) -> TaskVector:
        # Not dense - base, which would round the tangent to the base's precision.
        own, tau = self._base(), self.change()
        moved = task_vector({name: own[name] for name in base}, base)
        return {name: tau[name].detach().to(shift) + shift for name, shift in moved.items()}

    @override
    def state(self, base: State, tau: State) -> dict[str, Tensor]:
        trained = tau if self.decay_to == "base" else apply_task_vector(base, tau)
        return {f"base.{name}": tensor for name, tensor in base.items()} | {
            f"tangent.{name}": trained[name].to(tensor) for name, tensor in base.items()
        }

    @override
    def renew(self, generator: torch.Generator) -> None:
        """Do nothing: the tangent is kept, and nothing is drawn."""

    @override
    def folded(self) -> nn.Module:
        """Return the non-linear module with the weights ``theta_0 + tau``."""
        module = deepcopy(self.base)
        named = dict(module.named_parameters())
        with torch.no_grad():
            for name, tensor in self.dense().items():
                named[name].requires_grad_(True).copy_(tensor)
        return module

    @override
    def dense_name(self, own: str) -> str:
        return own.removeprefix("base.")

    def _place(self, name: str, parameter: nn.Parameter) -> None:
        """Register a tangent under a dotted name, with empty modules as its parents."""
        *path, last = name.split(".")
        module = self.tangent
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, parameter)
