"""Libraries of the optional extra ``search``."""

import importlib
from types import ModuleType


def needed(library: str, method: str) -> ModuleType:
    """Import a library that a strategy needs.

    Args:
        library: Name of the library.
        method: Name of the strategy.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ValueError(
            f"expected the library {library} for the search {method!r}, which is not installed: "
            "pip install 'clmerge[search]', or take differential_evolution"
        ) from None
