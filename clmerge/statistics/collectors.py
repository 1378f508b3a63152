"""Statistics for precision and Gram rules: exact diagonal Fisher and Gram matrices of layer inputs."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from clmerge.weights.modes import eval_mode
from clmerge.weights.task_vector import accumulator_dtype

Batch = Tensor | Sequence[Any]
"""Inputs, or inputs followed by labels."""


def diagonal_fisher(
    module: nn.Module,
    batches: Iterable[Batch],
    parameters: Sequence[str] | None = None,
    *,
    labels: Literal["model", "true", "sampled"] = "model",
    chunk_size: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information, exactly: squares of gradients per example (arXiv 2111.09832).

    ``mean over x of sum over c of p(c|x) * (d log p(c|x) / d theta)^2`` with the module's own probabilities p. Squaring
    the gradient of a batch, as some implementations do, is another quantity. The module runs in eval mode and is
    unchanged afterwards. Takes one forward pass per example and, with model labels, one backward pass per class.

    Args:
        module: A classifier, ``logits = module(inputs)`` with logits (batch, num_classes). Not compiled.
        batches: Inputs (batch, ...), or tuples of inputs and class labels (batch,), indices of the logits.
        parameters: Names in ``module.named_parameters()``. Default: those that are trainable.
        labels: ``"model"`` sums over all classes; ``"sampled"`` draws one class per example, which is unbiased and
            cheap with many classes; ``"true"`` uses the given labels, the empirical Fisher.
        chunk_size: Examples at a time; the gradients of each take as much memory as the parameters.
        seed: Seeds ``"sampled"``.

    Returns:
        Mean over examples by parameter name, float32 (float64 for float64 parameters), on their device.

    Raises:
        ValueError: If there is no example, a parameter is unknown, labels are missing, or logits have another shape.

    Example:
        >>> module = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(module.weight)  # p = 1/2, so d log p / d logit is plus or minus 1/2
        >>> diagonal_fisher(module, [torch.tensor([[2.0]])])
        {'weight': tensor([[1.],
                [1.]])}
    """
    chosen = chosen_parameters(module, parameters)
    return mean_of_squares(module, batches, chosen, labels=labels, chunk_size=chunk_size, seed=seed)


def mean_of_squares(
    module: nn.Module,
    batches: Iterable[Batch],
    chosen: Mapping[str, Tensor],
    *,
    of: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda gradients: gradients,
    labels: Literal["model", "true", "sampled"] = "model",
    chunk_size: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Average the squares of a linear function of the gradients of single examples.

    Args:
        module: As for ``diagonal_fisher``.
        batches: Inputs, or inputs and labels.
        chosen: The parameters to differentiate by, by name.
        of: The linear function: maps gradients (examples, ...) by parameter to values (examples, ...) by any name.
            Default: the gradients themselves.
        labels: Source of the labels, as for ``diagonal_fisher``.
        chunk_size: Examples at a time.
        seed: Seeds ``"sampled"``.

    Returns:
        Mean over examples by name, float32 (float64 for float64 parameters), on their device.

    Raises:
        ValueError: As for ``diagonal_fisher``.
    """
    if labels not in ("model", "true", "sampled"):
        raise ValueError(f"expected labels 'model', 'true' or 'sampled', got {labels!r}")
    if chunk_size < 1:
        raise ValueError(f"expected a chunk of 1 example or more, got {chunk_size}")
    rest = {name: tensor.detach() for name, tensor in module.named_parameters() if name not in chosen}
    generator = torch.Generator().manual_seed(seed)
    num_examples = 0

    def log_probabilities(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        logits = functional_call(module, {**rest, **tensors}, (x.unsqueeze(0),))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"expected logits of shape (batch, num_classes) from the module, got {got}")
        return functional.log_softmax(logits[0], dim=0, dtype=accumulator_dtype(logits))

    # Fused attention kernels cannot be batched over weights by vmap.
    with eval_mode(module), _plain_attention(), torch.inference_mode(False), torch.enable_grad():
        fisher: dict[str, Tensor] = {}
        for batch in batches:
            inputs, targets = split(batch, module_device(module))
            num_examples += len(inputs)
            for start in range(0, len(inputs), chunk_size):
                xs = inputs[start : start + chunk_size]
                # One copy of the parameters per example: the gradient of a copy is that of its example.
                copies = {name: tensor.expand(len(xs), *tensor.shape) for name, tensor in chosen.items()}
                outputs, pull = _pullback(log_probabilities, copies, xs)
                ys = targets[start : start + chunk_size] if targets is not None else None
                for cotangent, weight in drawn(outputs, ys, labels, generator):
                    for name, value in of(pull(cotangent)).items():
                        squares = value.to(accumulator_dtype(value)).square()
                        total = torch.tensordot(weight.to(squares.dtype), squares, dims=1)
                        fisher[name] = fisher[name].add_(total) if name in fisher else total
    if not num_examples:
        raise ValueError("expected at least one example to compute the Fisher information from, got none")
    return {name: total.div_(num_examples) for name, total in fisher.items()}


def gram_matrices(
    module: nn.Module,
    batches: Iterable[Batch],
    parameters: Sequence[str] | None = None,
    *,
    normalize: bool = False,
) -> dict[str, Tensor]:
    """Sum ``X^T X`` over the inputs of every linear map of a module, those inside attention too (arXiv 2212.09849).

    Hooks do not fire for the projections of ``nn.MultiheadAttention``, so calls of ``functional.linear`` and ``@`` with
    one of the parameters are intercepted instead: ``nn.Linear``, packed or separate input projections, output
    projections, and matrices (in, out) that are used as ``x @ proj``, for which the Gram matrix is also (in, in). The
    module runs in eval mode, without gradients, and is unchanged afterwards.

    Args:
        module: The module that is called with the inputs. Not compiled.
        batches: Inputs (batch, ...), or tuples that begin with them; labels are not used.
        parameters: Names in ``module.named_parameters()``. Default: those that are trainable. Parameters that are not
            a matrix of a linear map, such as biases and embeddings, get no Gram matrix.
        normalize: Divide by the number of rows of X, the tokens, so that the amount of data does not matter.

    Returns:
        Gram matrices (in, in) by parameter name, float64, on the parameters' device.

    Raises:
        ValueError: If a parameter is unknown, none is used as a matrix, or an attention with a packed projection
            is given other keys or values than queries.

    Example:
        >>> gram_matrices(nn.Linear(2, 3), [torch.tensor([[1.0, 2.0], [0.0, 1.0]])])
        {'weight': tensor([[1., 2.],
                [2., 5.]], dtype=torch.float64)}
    """
    chosen = chosen_parameters(module, parameters, detach=False)
    inputs_of = _LinearInputs({id(parameter): name for name, parameter in chosen.items() if parameter.ndim == 2})
    with eval_mode(module), torch.inference_mode(False), torch.no_grad():
        for batch in batches:
            inputs, _ = split(batch, module_device(module))
            with inputs_of:
                module(inputs)
    if not inputs_of.grams:
        raise ValueError(
            "expected a linear map with one of the chosen parameters to be called, got none; give at least one "
            "batch, and a module that is not compiled"
        )
    rows = inputs_of.rows
    return {name: gram.div_(rows[name]) if normalize else gram for name, gram in inputs_of.grams.items()}


class _LinearInputs(TorchFunctionMode):
    """Sum the Gram matrices of the inputs that are multiplied by given parameters."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.grams: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._attend(inspect.signature(func).bind(*args, **kwargs))
        if func is functional.linear:
            self._see(*(args[index] if len(args) > index else kwargs[key] for index, key in enumerate(LINEAR)))
        elif func in PRODUCTS and len(args) == 2:
            self._see(args[0], args[1])
        return func(*args, **kwargs)

    def _see(self, inputs: Tensor, weight: Tensor | None) -> None:
        name = self._names.get(id(weight))
        if name is None:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        rows = rows.to(accumulator_dtype(rows))
        gram = (rows.t() @ rows).double()
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram
        self.rows[name] = self.rows.get(name, 0) + len(rows)

    def _attend(self, call: inspect.BoundArguments) -> Any:
        """Call attention without its output projection, then apply that where it is intercepted."""
        given = call.arguments
        query, key, value, packed = (given[name] for name in ("query", "key", "value", "in_proj_weight"))
        if id(packed) in self._names and not (query is key and key is value):
            raise ValueError(
                f"expected self-attention in {self._names[id(packed)]!r}, whose projections are packed, got other keys "
                "or values than queries; leave the parameter out"
            )
        self._see(query, packed)
        for inputs, name in ((query, "q_proj_weight"), (key, "k_proj_weight"), (value, "v_proj_weight")):
            self._see(inputs, given.get(name))
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if id(weight) not in self._names:
            return functional.multi_head_attention_forward(*call.args, **call.kwargs)
        given["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given["out_proj_bias"] = None
        attended, weights = functional.multi_head_attention_forward(*call.args, **call.kwargs)
        self._see(attended, weight)
        return functional.linear(attended, weight, bias), weights


LINEAR = ("input", "weight")
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


def _pullback(
    function: Callable[[dict[str, Tensor], Tensor], Tensor], copies: dict[str, Tensor], xs: Tensor
) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """Return the function's output for every example, (batch, num_classes), and its vector-Jacobian product."""
    outputs, pull = vjp(lambda tensors: vmap(function)(tensors, xs), copies)[:2]
    return outputs.detach(), lambda cotangent: pull(cotangent)[0]


def drawn(
    log_probabilities: Tensor, targets: Tensor | None, labels: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one-hot labels, (batch, num_classes), and their weights, (batch,)."""
    probabilities = log_probabilities.exp()
    if labels == "model":
        for c in range(probabilities.shape[1]):
            cotangent = torch.zeros_like(probabilities)
            cotangent[:, c] = 1
            yield cotangent, probabilities[:, c]
        return
    if labels == "sampled":
        targets = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0]
    if targets is None:
        raise ValueError("expected batches of (inputs, labels) for true labels, got inputs alone")
    targets = targets.to(probabilities.device)
    one_hot = functional.one_hot(targets, probabilities.shape[1]).to(probabilities.dtype)
    yield one_hot, torch.ones_like(probabilities[:, 0])


def chosen_parameters(module: nn.Module, names: Sequence[str] | None, *, detach: bool = True) -> dict[str, Tensor]:
    """Return the parameters with these names, by default the trainable ones."""
    known = dict(module.named_parameters())
    names = [name for name, parameter in known.items() if parameter.requires_grad] if names is None else names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected names of the module's parameters, got {unknown[0]!r}, which it does not have")
    return {name: known[name].detach() if detach else known[name] for name in names}


def split(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of a batch, and its labels or None."""
    inputs, targets = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)
    inputs = inputs.to(device)
    # Tensors created in inference mode cannot be saved for a backward pass.
    return inputs.clone() if inputs.is_inference() else inputs, targets


def module_device(module: nn.Module) -> torch.device:
    """Return the device of a module's parameters."""
    return next(module.parameters()).device


@contextmanager
def _plain_attention() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
