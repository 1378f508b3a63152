"""RegMean: least-squares weights that reproduce the layer outputs of every task's expert."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.checks import checked_share
from clmerge.merging.orientation import IN_OUT
from clmerge.merging.precision.gram import Gram
from clmerge.merging.required import tensors_of
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class RegMean(Gram):
    """Solve for the linear layers that reproduce every task's outputs (Jin et al., arXiv 2212.09849).

    ``W = sum(W_t G_t) sum(G_t)^-1`` for matrices (out, in) that come with the Gram matrix ``G_t = X_t^T X_t`` of
    their inputs, off-diagonal entries multiplied by ``reduce``. The same holds for task vectors. Parameters without
    a Gram matrix are averaged: biases, norms, embeddings. State: 4 bytes per parameter, 8 more per entry of a
    matrix with Gram and 8 in^2 for it, in float64.

    The paper sums over tokens; MergeLM and FusionBench take the mean per token, which makes tasks with different
    amounts of data weigh the same (the collector offers both). They invert in float32 without ridge; here
    directions that no task's inputs have keep the average.

    Args:
        reduce: Factor of the off-diagonal entries, in [0, 1]; 1 is plain least squares. The paper advises 0.9 (0.1
            for T5); MergeLM searches 0.7 to 1, FusionBench has 0.95.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``reduce`` or ``ridge`` is out of range.

    Example:
        >>> import torch
        >>> merger = RegMean()
        >>> one, other = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> merger.update({"w": torch.tensor([[4.0, 4.0]])}, statistics={"gram": {"w": one}})
        >>> merger.update({"w": torch.tensor([[0.0, 0.0]])}, statistics={"gram": {"w": other}})
        >>> merger.compute()
        {'w': tensor([[3., 2.]])}
    """

    name = "regmean"
    summary = "least-squares fit of every task's layer outputs, from Gram matrices of the inputs"
    source = "2212.09849"
    requires = frozenset({"gram"})

    def __init__(
        self,
        reduce: float = 0.9,
        *,
        ridge: float = 1e-8,
        transposed: Sequence[str] = IN_OUT,
        scale: float = 1.0,
    ) -> None:
        super().__init__(ridge, transposed=transposed, scale=scale)
        self.reduce = checked_share("reduce", reduce)

    @override
    def _plan(self, vector: State, step: Step) -> State:
        grams = tensors_of(step, "gram")
        for name, gram in grams.items():
            if name not in vector or vector[name].ndim != 2:
                raise ValueError(
                    f"expected Gram matrices of matrices in the task vector, got one for {name!r} of task "
                    f"{step.task}; collect them for the parameters that are merged"
                )
            inputs = self._oriented(name, vector[name]).shape[1]
            if gram.shape != (inputs, inputs):
                raise ValueError(
                    f"expected a Gram matrix of shape {(inputs, inputs)} for {name!r} of task {step.task}, got "
                    f"{tuple(gram.shape)}; name matrices of shape (in, out) in transposed"
                )
        if self.num_tasks:
            self._check_names(grams.keys(), f"task {step.task}")
        return grams

    @override
    def _gram(self, name: str, tau: Tensor, plan: State) -> Tensor | None:
        if name not in plan:
            return None
        gram = plan[name].detach().to(tau.device, torch.float64)
        return torch.lerp(torch.diag(gram.diagonal()), gram, self.reduce)

    @override
    def _has_gram(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._shapes:
            return name in self._grams
        # Before the first task: the inputs of linear layers are collected, not those of embeddings.
        return super()._has_gram(name, shape) and (
            name.endswith("weight") or any(fnmatchcase(name, pattern) for pattern in self.transposed)
        )

    @override
    def _join(self, other: Self) -> None:
        if self.num_tasks:
            self._check_names(other._grams.keys(), "a merger")
        super()._join(other)

    def _check_names(self, names: Any, source: str) -> None:
        if changed := sorted(set(names) ^ self._grams.keys()):
            raise ValueError(
                f"expected Gram matrices of the parameters that had one so far, got others in {source}, for "
                f"example {changed[0]!r}; collect the same for every task"
            )
