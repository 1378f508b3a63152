"""The space that a search looks at: one interval or list of values for every parameter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.float64]
"""Points of the unit cube, shape (points, parameters): 0 is the first value of a parameter, 1 the last."""

_DIGITS = 9


class Space:
    """The values of one or more parameters, as a unit cube.

    Numbers are ordered, and strategies that need not stay on a grid try every number between the smallest and the
    largest (whole ones, if all are whole); other values are taken from their list.

    Args:
        grid: Values by parameter.

    Raises:
        ValueError: If a parameter has no values.

    Example:
        >>> space = Space({"scale": [0.0, 0.5, 2.0], "merge": ["mean", "sum"]})
        >>> space.listed(np.array([[0.4, 1.0]])), space.between(np.array([[0.4, 1.0]]))
        ([{'scale': 0.5, 'merge': 'sum'}], [{'scale': 0.8, 'merge': 'sum'}])
    """

    def __init__(self, grid: Mapping[str, Sequence[Any]]) -> None:
        if empty := [name for name, values in grid.items() if not len(values)]:
            raise ValueError(f"expected values of {empty[0]} to try, got none")
        self.grid = {name: list(values) for name, values in grid.items()}

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.grid)

    def listed(self, units: Units) -> list[dict[str, Any]]:
        """Return the points of the grid that are nearest in the order of the lists."""
        return [
            {
                name: values[round(float(u) * (len(values) - 1))]
                for (name, values), u in zip(self.grid.items(), row, strict=True)
            }
            for row in np.clip(units, 0, 1)
        ]

    def between(self, units: Units) -> list[dict[str, Any]]:
        """Return points whose numbers need not be listed."""
        exact = self.listed(units)
        for row, point in zip(np.clip(units, 0, 1), exact, strict=True):
            for (name, values), u in zip(self.grid.items(), row, strict=True):
                if is_numeric(values):
                    number = min(values) + float(u) * (max(values) - min(values))
                    point[name] = round(number) if all(isinstance(v, int) for v in values) else round(number, _DIGITS)
        return exact

    def unit(self, point: Mapping[str, Any]) -> Units:
        """Return where a point lies in the unit cube; a value that the space does not have is in the middle.

        Args:
            point: Values of some parameters.
        """
        return np.array([_unit(values, point.get(name)) for name, values in self.grid.items()])


def is_numeric(values: Sequence[Any]) -> bool:
    """Return whether all values are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _unit(values: Sequence[Any], value: Any) -> float:
    if is_numeric(values) and isinstance(value, int | float) and max(values) > min(values):
        return float(np.clip((value - min(values)) / (max(values) - min(values)), 0, 1))
    return values.index(value) / max(len(values) - 1, 1) if value in values else 0.5
