"""Sharpness-aware minimisation: an optimizer that wraps another one to find flat minima."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from clmerge.weights.task_vector import accumulator_dtype


class SAM(Optimizer):
    """Step by the gradient at the worst nearby weights (sharpness-aware minimisation, arXiv 2010.01412).

    With the gradient g at theta, the perturbed weights are ``theta + rho * g / |g|``; the base optimizer applies the
    gradient there to theta. Costs two forward and backward passes per step, and one copy of the trained weights.

    In a Lightning Trainer it is an optimizer like any other. Gradient clipping applies to both gradients; clipping the
    norm does not change the first step. ``train/loss`` is that of the second pass, at the perturbed weights. Batch norm
    sees every batch twice. Under DDP both gradients are averaged over the processes. Neither ``precision: 16-mixed``,
    whose gradient scaler calls no closure, nor gradient accumulation can be combined with it.

    Args:
        params: Parameters to train, as for any optimizer.
        base: Optimizer class with its settings; default AdamW with lr 1e-5 and weight decay 0.1.
        rho: Distance of the perturbed weights; 0.05 in the paper.

    Raises:
        ValueError: If ``rho`` is negative.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> sam = SAM([w], base=lambda params: torch.optim.SGD(params, lr=0.1), rho=0.5)
        >>> def closure():
        ...     sam.zero_grad()
        ...     loss = (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = sam.step(closure)  # the gradient at 1.5 is 3
        >>> w.data
        tensor([0.7000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[[Iterable[Any]], Optimizer] | None = None,
        *,
        rho: float = 0.05,
    ) -> None:
        if not rho >= 0:
            raise ValueError(f"expected rho of 0 or more, got {rho}")
        self.base = (base or partial(AdamW, lr=1e-5, weight_decay=0.1))(params)
        self.rho = rho
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share()

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Recomputes loss and gradients; called twice.

        Returns:
            The result of the first call of the closure: the loss at the unperturbed weights.

        Raises:
            RuntimeError: Without a closure.
        """
        if closure is None:
            raise RuntimeError(
                f"expected a closure for {type(self).__name__}, got none; under precision='16-mixed' the Trainer "
                "gives none: use 'bf16-mixed' or '32-true'"
            )
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        with torch.no_grad():
            before = self._ascend()
        self.zero_grad()
        try:
            evaluate()
        finally:
            with torch.no_grad():
                for parameter, value in before.items():
                    parameter.copy_(value)
        self.base.step()
        return loss

    def _ascend(self) -> dict[Tensor, Tensor]:
        """Move to the perturbed weights; return the original ones."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = {parameter: parameter.clone() for parameter in moved}
        if moved:
            device = moved[0].device
            norms = [(self._scale(p) * p.grad).norm(dtype=accumulator_dtype(p)).to(device) for p in moved]
            factor = self.rho / (torch.stack(norms).norm() + 1e-12)
            for parameter in moved:
                step = self._scale(parameter) ** 2 * parameter.grad
                parameter.add_(step * factor.to(step))
        return before

    def _scale(self, parameter: Tensor) -> Tensor | float:
        """Return T of the ascent ``rho * T^2 g / |T g|``."""
        return 1.0

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state; SAM itself has none."""
        return self.base.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state."""
        self.base.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        # Schedulers set learning rates here, and Lightning moves the state to the model's device.
        self.param_groups = self.base.param_groups
        self.state = self.base.state


class ASAM(SAM):
    """SAM with a neighbourhood that is invariant to the scale of the weights (arXiv 2102.11600).

    The perturbed weights are ``theta + rho * T^2 g / |T g|`` with ``T = |theta| + eta`` entrywise for matrices and
    kernels; biases and other vectors have T = 1 (the authors' code selects parameters with ``weight`` in their name).
    Otherwise as SAM.

    Args:
        params: Parameters to train, as for any optimizer.
        base: Optimizer class with its settings; default AdamW with lr 1e-5 and weight decay 0.1.
        rho: Size of the neighbourhood; 0.5 in the authors' code.
        eta: Added to the weights' magnitude; 0.01 in the authors' code.

    Raises:
        ValueError: If ``rho`` or ``eta`` is negative.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[[Iterable[Any]], Optimizer] | None = None,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
    ) -> None:
        if not eta >= 0:
            raise ValueError(f"expected eta of 0 or more, got {eta}")
        super().__init__(params, base, rho=rho)
        self.eta = eta

    @override
    def _scale(self, parameter: Tensor) -> Tensor | float:
        return parameter.abs() + self.eta if parameter.ndim > 1 else 1.0
