"""The output Kronecker factor of the Fisher information, from gradients at the outputs of every linear map."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from clmerge.statistics.collectors import LINEAR, PRODUCTS, Batch, chosen_parameters, drawn, module_device, split
from clmerge.weights.modes import eval_mode
from clmerge.weights.task_vector import accumulator_dtype


def output_gram_matrices(
    module: nn.Module,
    batches: Iterable[Batch],
    parameters: Sequence[str] | None = None,
    *,
    labels: Literal["model", "true", "sampled"] = "sampled",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Average ``g g^T`` over the outputs of every linear map, ``g`` being the gradient of ``log p`` of one example.

    With ``A = gram_matrices(...)``, the sum over tokens of ``x x^T``, ``A`` and this ``B`` are the factors of K-FAC
    (arXiv 1503.05671, for layers that are applied to many tokens as in arXiv 2311.00636, "expand"): ``B (x) A``
    approximates the Fisher information of the matrix, summed over the examples. The module runs in eval mode, with one
    forward and backward pass per batch (one backward per class with model labels), and is unchanged afterwards.
    Examples of a batch must not influence each other, which holds in eval mode.

    Args:
        module: A classifier, ``logits = module(inputs)`` with logits (batch, num_classes). Not compiled.
        batches: Inputs (batch, ...), or tuples of inputs and class labels (batch,), indices of the logits.
        parameters: Names in ``module.named_parameters()``. Default: those that are trainable.
        labels: ``"sampled"`` draws one class per example, ``"model"`` sums over all classes, ``"true"`` uses the
            given labels; see ``diagonal_fisher``.
        seed: Seeds ``"sampled"``.

    Returns:
        Matrices (out, out) by parameter name, float64, on the parameters' device; also for ``x @ proj`` of shape
        (in, out).

    Raises:
        ValueError: If a parameter is unknown, none is used as a matrix, labels are missing, logits have another shape,
            or an attention with a packed projection is given other keys or values than queries.

    Example:
        >>> module = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(module.weight)  # p = 1/2, so the gradient is (1/2, -1/2) or the opposite
        >>> output_gram_matrices(module, [torch.tensor([[2.0]])])
        {'weight': tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]], dtype=torch.float64)}
    """
    if labels not in ("model", "true", "sampled"):
        raise ValueError(f"expected labels 'model', 'true' or 'sampled', got {labels!r}")
    chosen = {name: p for name, p in chosen_parameters(module, parameters, detach=False).items() if p.ndim == 2}
    outputs_of = _LinearOutputs({id(parameter): name for name, parameter in chosen.items()})
    generator = torch.Generator().manual_seed(seed)
    with eval_mode(module), torch.inference_mode(False), torch.enable_grad(), _trainable(chosen.values()):
        for batch in batches:
            inputs, targets = split(batch, module_device(module))
            with outputs_of:
                logits = module(inputs)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"expected logits of shape (batch, num_classes) from the module, got {got}")
            outputs = outputs_of.taken()
            if not outputs:
                continue
            log_probabilities = functional.log_softmax(logits, dim=1, dtype=accumulator_dtype(logits))
            for cotangent, weight in drawn(log_probabilities.detach(), targets, labels, generator):
                # The square root, because the gradient will be squared.
                pulled = cotangent * weight.sqrt().unsqueeze(1)
                tensors = [output for _, output in outputs]
                gradients = torch.autograd.grad(
                    log_probabilities, tensors, pulled, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for (name, _), gradient in zip(outputs, gradients, strict=True):
                    outputs_of.see(name, gradient)
            outputs_of.count(outputs)
    if not outputs_of.rows:
        raise ValueError(
            "expected a linear map with one of the chosen parameters to be called, got none; give at least one "
            "batch, and a module that is not compiled"
        )
    return {name: total / outputs_of.rows[name] for name, total in outputs_of.grams.items()}


class _LinearOutputs(TorchFunctionMode):
    """Collect the outputs of linear maps with given parameters, and sum the Gram matrices of their gradients."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self._outputs: list[tuple[str, Tensor]] = []
        self.grams: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def taken(self) -> list[tuple[str, Tensor]]:
        """Return the outputs since the last call, with the names of their parameters."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def see(self, name: str, gradient: Tensor) -> None:
        """Add the gradients at one output."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        rows = rows.to(accumulator_dtype(rows))
        gram = (rows.t() @ rows).double()
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram

    def count(self, outputs: list[tuple[str, Tensor]]) -> None:
        """Count the rows of outputs whose gradients were added."""
        for name, output in outputs:
            self.rows[name] = self.rows.get(name, 0) + output.numel() // output.shape[-1]

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._attend(inspect.signature(func).bind(*args, **kwargs))
        result = func(*args, **kwargs)
        if func is functional.linear:
            weight = args[1] if len(args) > 1 else kwargs[LINEAR[1]]
        elif func in PRODUCTS and len(args) == 2:
            weight = args[1]
        else:
            return result
        return self._gather(weight, result)

    def _gather(self, weight: Tensor | None, output: Tensor) -> Tensor:
        if name := self._names.get(id(weight)):
            self._outputs.append((name, output))
        return output

    def _linear(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return self._gather(weight, functional.linear(inputs, weight, bias))

    def _attend(self, call: inspect.BoundArguments) -> Any:
        """Apply the projections where they are intercepted, and call attention with identities in their place."""
        given = call.arguments
        query, key, value, packed = (given[name] for name in ("query", "key", "value", "in_proj_weight"))
        separate: list[Tensor | None] = [given.get(f"{kind}_proj_weight") for kind in "qkv"]
        watched = [id(weight) in self._names for weight in (packed, *separate)]
        if any(watched):
            bias = given["in_proj_bias"]
            if packed is not None:
                if not (query is key and key is value):
                    raise ValueError(
                        f"expected self-attention in {self._names[id(packed)]!r}, whose projections are packed, got "
                        "other keys or values than queries; leave the parameter out"
                    )
                projected = self._linear(query, packed, bias).chunk(3, dim=-1)
            else:
                biases = (None, None, None) if bias is None else bias.chunk(3)
                projected = tuple(map(self._linear, (query, key, value), separate, biases))
            width = given["embed_dim_to_check"]
            identity = torch.eye(width, dtype=query.dtype, device=query.device)
            given |= dict(zip(("query", "key", "value"), projected, strict=True))
            given |= {"in_proj_weight": None, "in_proj_bias": None, "use_separate_proj_weight": True}
            given |= {f"{kind}_proj_weight": identity for kind in "qkv"}
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if id(weight) not in self._names:
            return functional.multi_head_attention_forward(*call.args, **call.kwargs)
        given["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given["out_proj_bias"] = None
        attended, weights = functional.multi_head_attention_forward(*call.args, **call.kwargs)
        return self._linear(attended, weight, bias), weights


@contextmanager
def _trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make outputs require gradients even if the parameters are frozen."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
