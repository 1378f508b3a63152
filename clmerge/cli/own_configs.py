"""Find the package's own configurations for names such as ``configs/quickstart.yaml`` that the working folder lacks."""

from collections.abc import Sequence
from pathlib import Path

from clmerge.names import tell

_PREFIX = "configs/"


def use_own_configs(argv: Sequence[str]) -> list[str]:
    """Replace the paths of configurations that exist in the package only by their places.

    Args:
        argv: Words of a command: ``--config FILE`` or ``--config=FILE``.

    Example:
        >>> use_own_configs(["--config", "mine.yaml", "--seed=1"])
        ['--config', 'mine.yaml', '--seed=1']
    """
    found = list(argv)
    for position, word in enumerate(found):
        option, equals, value = word.partition("=")
        if option != "--config":
            continue
        if equals:
            found[position] = f"--config={_place(value)}"
        elif position + 1 < len(found):
            found[position + 1] = _place(found[position + 1])
    return found


def _place(file: str) -> str:
    if not file.startswith(_PREFIX) or Path(file).exists():
        return file
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parent / "configs"):  # in a wheel; beside the package in a clone
        if (own := folder / file.removeprefix(_PREFIX)).is_file():
            tell(f"config    {own}, of the package")
            return str(own)
    return file
