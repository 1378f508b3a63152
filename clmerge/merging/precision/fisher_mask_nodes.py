"""Fisher averaging by the information of attention heads and hidden features instead of single weights."""

from clmerge.merging.precision.fisher import Fisher


class FisherMaskNodes(Fisher):
    """Average the task vectors by the Fisher information of mask nodes (Thennal et al., arXiv 2403.09891).

    ``scale * sum(F_t * tau_t) / sum(F_t)``, where ``F_t`` is the information of the attention head or of the hidden
    feature that a weight belongs to, or a mean of these; ``clmerge.statistics.mask_nodes`` defines and measures it.
    It is less noisy than the information of single weights. Weights without information in any task are averaged, as
    in the authors' code. The paper's coefficient of every task is 1 here. State: 8 bytes per parameter.

    Args:
        floor: Least information of a weight, above 0.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``floor`` is not positive.

    Example:
        >>> import torch
        >>> merger = FisherMaskNodes()
        >>> merger.update({"w": torch.tensor([1.0])}, statistics={"mask_fisher": {"w": torch.tensor([3.0])}})
        >>> merger.update({"w": torch.tensor([5.0])}, statistics={"mask_fisher": {"w": torch.tensor([1.0])}})
        >>> merger.compute()
        {'w': tensor([2.])}
    """

    name = "fisher_mask_nodes"
    summary = "mean weighted by the Fisher information of attention heads and hidden features"
    source = "2403.09891"

    def __init__(self, floor: float = 1e-12, *, scale: float = 1.0) -> None:
        super().__init__(floor, statistic="mask_fisher", scale=scale)
