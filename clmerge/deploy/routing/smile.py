"""SMILE: every token picks the experts in whose subspace it lies; no data, no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from clmerge.deploy.routing.experts import Experts, Targets, stacked
from clmerge.deploy.routing.mixture import Gates
from clmerge.deploy.routing.routers import Router, SubspaceRouter
from clmerge.deploy.routing.routing import Deployment, Routing


class Smile(Routing):
    """Per token and layer, the experts whose leading singular vectors read most of it (SMILE, arXiv 2408.10174).

    The weights are the softmax of the lengths ``|V_t x|`` over the tasks, of which the ``top_k`` largest are kept and
    normalised again. Nothing but task vectors is needed: exact online, in any order, and without any image. In the
    paper everything that is not a mixed layer stays theta_0's; here it is the merger's. Its numbers are for models with
    separate projections of attention, too; by default MLPs alone are mixed here.

    Args:
        rank: Singular triplets per layer and task; the paper's 32 is near its best.
        targets: As for ``Routing``.
        gate_k: Singular vectors of each expert that the router looks at; at most ``rank``.
        top_k: Experts that a token uses; 1 in the paper.

    Raises:
        ValueError: For a number out of range.
    """

    name = "smile"
    source: ClassVar[str] = "2408.10174"
    summary: ClassVar[str] = "per token, the experts in whose subspace it lies"

    def __init__(self, *, rank: int | None = 32, targets: Targets = "mlp", gate_k: int = 16, top_k: int = 1) -> None:
        super().__init__(rank=rank, targets=targets)
        if top_k < 1 or gate_k < 1 or (rank is not None and gate_k > rank):
            raise ValueError(
                f"expected top_k of 1 or more and gate_k from 1 to rank, got top_k={top_k}, gate_k={gate_k}, "
                f"rank={rank}"
            )
        self.gate_k = gate_k
        self.top_k = top_k

    @override
    def gates(self, experts: Sequence[Experts], deployment: Deployment) -> dict[str, Gates]:
        found = {}
        for layer in experts[0]:
            a = stacked(experts, layer)[0]
            router = SubspaceRouter(len(experts), min(self.gate_k, a.shape[1]), self.top_k).fit(a)
            found[layer] = Gates(router, layer)
        return found

    @override
    def router(self, deployment: Deployment) -> Router | None:
        return None
