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


def own_configs_beside(file: str) -> list[str]:
    """Return the names of the package's configurations in the folder that a name points to.

    Example:
        >>> "configs/quickstart.yaml" in own_configs_beside("configs/quickstar.yaml")
        True
    """
    if not file.startswith(_PREFIX):
        return []
    parent = Path(file).parent
    found = [folder / parent.relative_to(_PREFIX.rstrip("/")) for folder in _folders()]
    return [str(parent / each.name) for folder in found if folder.is_dir() for each in sorted(folder.glob("*.yaml"))]


def _folders() -> list[Path]:
    package = Path(__file__).parents[1]
    return [package / "configs", package.parent / "configs"]  # in a wheel; beside the package in a clone


def _place(file: str) -> str:
    if not file.startswith(_PREFIX) or Path(file).exists():
        return file
    for folder in _folders():
        if (own := folder / file.removeprefix(_PREFIX)).is_file():
            tell(f"config    {own}, of the package")
            return str(own)
    return file
