"""SVC: calibrate the singular values of the merged matrix by how often the tasks share a direction."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.orientation import outputs_first
from clmerge.merging.spectral.decomposition import Spectral, live_svd
from clmerge.merging.stored import Stored


class SVC(Spectral, Stored):
    """Sum the task matrices and take back what they count several times (SVC, arXiv 2602.05536).

    With ``u_r`` a left singular vector of ``M = sum(tau_t)``, the merged response ``a = u_r^T M`` is ``s_t = <a, a_t> /
    |a_t|^2`` times as strong along the response ``a_t = u_r^T tau_t`` of a task: 1 if no other task uses the
    direction, T if all agree. The singular value of ``u_r`` is multiplied by ``T / sum(max(alpha, s_t))``. Other
    parameters are averaged. A task without a response in a direction counts alpha.

    The responses depend on the directions of the sum, so the task vectors are kept. State: 4 bytes per parameter and
    task, or none with a bank; reading costs one decomposition per matrix, in float64.

    The paper calibrates the result of any rule; this is its rule on task arithmetic. FusionBench projects every task
    on its own singular vectors instead of those of the merged matrix, which is not the paper's equation.

    Args:
        alpha: Least count of a task, above 0; 1 is the paper's value and never strengthens a direction.
        scale: Scaling coefficient; 1 is the plain sum.

    Raises:
        ValueError: If ``alpha`` is not positive.

    Example:
        >>> merger = SVC()
        >>> merger.update({"w": torch.tensor([[3.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])})
        >>> merger.compute()  # the shared direction counts once, the other one is kept
        {'w': tensor([[3., 0.],
                [0., 1.]])}
    """

    name = "svc"
    summary = "sum of the task matrices, with directions that tasks share counted once"
    source = "2602.05536"

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        scale: float = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(scale, include=include, exclude=exclude, split_qkv=split_qkv)
        if not alpha > 0:
            raise ValueError(f"expected alpha above 0, got {alpha}")
        self.alpha = alpha

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        taus = self._taus(slots)
        pieces = self._matrices.by_matrix(name, taus)
        if not pieces:
            return torch.stack(taus).mean(dim=0) * self.scale
        found = [self._calibrated(name, torch.stack(each), taus[0].dtype) for each in pieces]
        return torch.cat(found).to(taus[0].dtype).contiguous()

    def _calibrated(self, name: str, taus: Tensor, dtype: torch.dtype) -> Tensor:
        oriented = torch.stack([outputs_first(name, tau) for tau in taus])
        u, s, vh = live_svd(oriented.sum(dim=0), dtype)
        responses = u.t() @ oriented  # (tasks, directions, inputs)
        merged = s.unsqueeze(1) * vh
        energy = responses.square().sum(dim=-1)
        silent = energy <= torch.finfo(dtype).eps ** 2 * oriented.square().sum(dim=(1, 2)).unsqueeze(1)
        counts = torch.where(silent, 0.0, (responses * merged).sum(dim=-1) / energy.where(~silent, torch.ones_like(s)))
        gammas = len(taus) / counts.clamp(min=self.alpha).sum(dim=0)
        return outputs_first(name, u * (gammas * self.scale) @ merged)
