"""A jsonargparse parser whose errors name the nearest valid option, class or value."""

import inspect
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, ClassVar, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader
from typing_extensions import override

from clmerge.bounded_yaml import check_yaml, yaml_cause
from clmerge.cli.named_code import refuse_functions, refused_path
from clmerge.cli.option_table import nearest
from clmerge.cli.outlines import class_options, plain
from clmerge.names import visible
from clmerge.weights.paths import what_it_is


class CommandFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keep the line breaks of the examples below the options."""


class CommandParser(ArgumentParser):
    """An argument parser of one command.

    Attributes:
        class_names: Names of the classes that options accept; the nearest one is suggested for a misspelt class.
    """

    class_names: ClassVar[Sequence[str]] = ()

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and the nearest valid word, without the usage, and exit with 2."""
        text = (message if ex is None else str(ex)).strip()
        if not self.exit_on_error:  # the nested parser of one class's arguments
            super().error(text, ex)
        if refused := refused_path(text):
            path, key = refused
            text = f"expected no code that runs commands in a configuration, got {path} at {key}; it was not imported"
        else:
            text = f"{plain(text)}{self._source(text)}{self._hint(text)}"
        text = visible(text, keep="\n")
        self.exit(2, f"{self.prog}: {text}\n")
        raise AssertionError("exit returned")

    @override
    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> Any:
        """Add the arguments of a class, with the class's docstring if the parser was made to show their help."""
        title: str = vars(self).get("description") or ""
        if title.startswith("Help for "):  # jsonargparse shows only the first line
            self.formatter_class = CommandFormatter
            self.description = f"{title}\n\n{described(theclass)}"
        added = super().add_class_arguments(theclass, *args, **kwargs)
        if _is_logger(theclass):
            self._default_save_dir()
        return added

    def _default_save_dir(self) -> None:
        """Make the folder of a logger optional: it is the run folder's ``logs``, which is known later."""
        for action in self._actions:
            if action.dest == "save_dir" and action.required:
                action.required = False
                action._typehint = action._typehint | None

    @override
    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Parse arguments; refuse a named pipe, a socket or a device among them.

        Options of nested classes are parsed a second time, after jsonargparse has parsed their values and formatted
        them as Python text: ``null`` arrives as ``None``, which a text type would keep as the text "None".
        """
        self._words = list(args or ())
        for word in self._words:
            for path in (word, word.partition("=")[2]):
                if path and what_it_is(path) not in ("nothing", "file", "folder"):
                    self.error(f"expected a file or a folder, got {path}, which is a {what_it_is(path)}")
        if args is not None and not self.exit_on_error:
            args = [
                f"{argument.removesuffix('=None')}=null" if argument.endswith("=None") else argument
                for argument in args
            ]
        try:
            return super().parse_args(args, *rest, **options)
        # jsonargparse raises these for malformed files
        except (AttributeError, LookupError, OverflowError, RuntimeError, ValueError) as error:
            text = f"expected a config that fits the options, got one over which reading fails: {error}"
            self.error(text)

    def _source(self, text: str) -> str:
        """Return the configuration files that may hold the wrong key, as text; empty if it is on the command line."""
        words = getattr(self, "_words", [])
        config = [action.dest for action in self._actions if isinstance(action, ActionConfigFile)]
        files = [
            (word.partition("=")[2] or following)
            for word, following in zip(words, [*words, ""][1:], strict=True)
            if word.partition("=")[0].removeprefix("--") in config
        ]
        key = re.search(r"(?:Parser key \"|Option '|Group ')([\w-]+)", text)
        given = key and any(re.match(rf"--{re.escape(key[1])}([=.+]|$)", word) for word in words)
        shown = [file for file in files if file and file not in text and "\n" not in file and not file.startswith("{")]
        return f" (in {', '.join(shown)})" if shown and not given and (key or "config" in text) else ""

    def _hint(self, text: str) -> str:
        """Return the nearest valid word in words; for an unknown setting of a class, of that class's settings."""
        if "did you mean" in text.lower():
            return ""
        if (known := class_options(text)) is not None and (found := re.search(r"Option '(\w+)' is not accepted", text)):
            near = nearest(found[1], known)
            return f"; did you mean {near}?" if near else f"; its settings are {', '.join(known) or 'none'}"
        given = (option for action in self._actions for option in action.option_strings)
        options = [option.removeprefix("--") for option in given if option.startswith("--") and option != "--help"]
        near = suggestion(text, options, self.class_names)
        return f"; did you mean {near}?" if near else ""

    @override
    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Instantiate the classes of the configuration.

        Raises:
            ValueError: If a ``class_path`` names anything but a class.
        """
        refuse_functions(namespace)
        return super().instantiate(namespace, *args, **kwargs)


def described(theclass: type) -> str:
    """Return the docstring of a class without its arguments, which the help lists separately.

    Example:
        >>> from clmerge.merging import Scale
        >>> described(Scale).splitlines()[0]
        "Multiply the merged vector by a scaling coefficient, in addition to the reducer's own."
    """
    text = inspect.getdoc(theclass) or ""
    return re.sub(r"^Args:\n(?:[ ].*\n|\n)*", "", f"{text}\n", flags=re.MULTILINE).strip()


def _is_logger(theclass: type) -> bool:
    """Return whether a class is a logger of Lightning, without importing Lightning."""
    loggers = sys.modules.get("lightning.pytorch.loggers")
    return loggers is not None and inspect.isclass(theclass) and issubclass(theclass, loggers.Logger)


_load_plain_yaml = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """Parse a configuration, or the value of an option, as jsonargparse does, but refuse alias bombs."""
    try:
        check_yaml(text)
        return _load_plain_yaml(text)
    except Exception as error:
        raise ValueError(yaml_cause(error)) from error


set_loader("yaml", _load_yaml, exceptions=(ValueError,))


def load_all(*packages: str) -> None:
    """Import every public name of packages that load them lazily: jsonargparse finds only loaded classes."""
    for package in packages:
        module = import_module(package)
        for name in module.__all__:
            getattr(module, name)


def known_subclasses(bases: Iterable[type]) -> list[str]:
    """Return the names of the imported subclasses of ``bases`` that options accept: concrete and public ones."""
    found: list[str] = []
    pending = [*bases]
    while pending:
        children: list[type] = pending.pop().__subclasses__()
        pending += children
        concrete = (child.__name__ for child in children if not inspect.isabstract(child))
        found += [name for name in concrete if not name.startswith("_")]
    return sorted(set(found))


def suggestion(message: str, options: Sequence[str], classes: Sequence[str]) -> str | None:
    """Return the valid word nearest to the unknown one in an error message of jsonargparse.

    Args:
        message: The error message.
        options: Dotted names of the valid options.
        classes: Names of the valid classes.

    Example:
        >>> suggestion("unrecognized arguments: --learner.start_polcy=base", ["learner.start_policy"], [])
        '--learner.start_policy'
        >>> suggestion("Expected a dot import path string: TEIS", [], ["MagMax", "TIES"])
        'TIES'
    """
    if found := re.search(r"unrecognized arguments: --([\w.-]+)", message):
        near = nearest(found[1], options)
        return near and f"--{near}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return nearest(f"{found[1]}.{found[2]}", options)
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        word = found[1]
        return nearest(word, options) or nearest(word.split(".")[0], {o.split(".")[0] for o in options})
    if found := re.search(r"Literal\[(.*?)\]\. Got value: (\S+)", message):
        return nearest(found[2], re.findall(r"'(.*?)'", found[1]))
    if found := re.search(r"dot import path string: (\w+)", message):
        return nearest(found[1], classes)
    return None
