"""Coefficients for groups of parameters, selected by name patterns."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from typing_extensions import override

from clmerge.merging.finish.finisher import Finisher
from clmerge.weights.task_vector import TaskVector


class GroupScale(Finisher):
    """Multiply each group of parameters by its own coefficient.

    A pattern is a shell glob over the whole parameter name, in which ``*`` also matches dots; the first that matches
    applies. Uses: coefficients per module type or modality (DAMC, MAM), patching the shallow layers alone
    (RWS: ``{"*blocks.[0-3].*": 1.0}, default=0``; open_clip's ``resblocks`` and timm's ``blocks`` match), adding
    a vector to a part of the model.

    Args:
        coefficients: Coefficient by pattern, in the order in which they are tried.
        default: Coefficient of the parameters that no pattern matches.

    Example:
        >>> import torch
        >>> vector = {"visual.proj": torch.ones(1), "logit_scale": torch.ones(1)}
        >>> GroupScale({"visual.*": 0.5}, default=0.0).finish(vector)
        {'visual.proj': tensor([0.5000]), 'logit_scale': tensor([0.])}
    """

    name = "group_scale"

    def __init__(self, coefficients: dict[str, float], *, default: float = 1.0) -> None:
        self.coefficients = dict(coefficients)
        self.default = default

    @override
    def check_names(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._check(shapes)

    def _check(self, names: Iterable[str]) -> None:
        names = list(names)
        for pattern in self.coefficients:
            if not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, names, n=3, cutoff=0.5) or names[:3]
                raise ValueError(
                    f"expected patterns that match a merged parameter, got {pattern!r}; the nearest names are "
                    f"{', '.join(map(repr, close))}"
                )

    @override
    def finish(self, vector: TaskVector) -> TaskVector:
        """Finish a merged vector.

        Raises:
            ValueError: If a pattern matches no parameter.
        """
        self._check(vector)
        for name, tensor in vector.items():
            matching = (scale for pattern, scale in self.coefficients.items() if fnmatchcase(name, pattern))
            tensor.mul_(next(matching, self.default))
        return vector
