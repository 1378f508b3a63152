"""The strategies by name."""

from typing import Literal

from clmerge.search.evolution import CmaEs
from clmerge.search.plain import DifferentialEvolution, Grid, Preferences
from clmerge.search.quadratic import Quadratic
from clmerge.search.sampled import Gaussian, Nsga
from clmerge.search.strategy import Strategy

Method = Literal["grid", "differential_evolution", "preferences", "cma_es", "gaussian", "nsga", "quadratic"]

METHODS: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Grid, DifferentialEvolution, Preferences, CmaEs, Gaussian, Nsga, Quadratic)
}
MAX_GRID_DIMENSIONS = 2


def default_method(num_parameters: int) -> str:
    """Return the strategy if none is named: the grid for one or two parameters, then differential evolution."""
    return Grid.name if num_parameters <= MAX_GRID_DIMENSIONS else DifferentialEvolution.name
