"""The strategies by name."""

from typing import Literal

from clmerge.merging.strategies.evolution import CmaEs
from clmerge.merging.strategies.plain import DifferentialEvolution, Grid, Preferences
from clmerge.merging.strategies.quadratic import Quadratic
from clmerge.merging.strategies.sampled import Gaussian, Nsga
from clmerge.merging.strategies.strategy import Strategy

Method = Literal["grid", "differential_evolution", "preferences", "cma_es", "gaussian", "nsga", "quadratic"]

METHODS: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Grid, DifferentialEvolution, Preferences, CmaEs, Gaussian, Nsga, Quadratic)
}
MAX_GRID_DIMENSIONS = 2


def default_method(num_parameters: int) -> str:
    """Return the strategy if none is named: the grid for one or two parameters, then differential evolution."""
    return Grid.name if num_parameters <= MAX_GRID_DIMENSIONS else DifferentialEvolution.name
