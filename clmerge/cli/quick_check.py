"""Check the words of a command line and its configuration files for typos before anything heavy is imported.

Only what is certainly wrong is refused: an unknown option, class or setting, a text where a number stands. Everything
else is left to the parser, which imports torch and Lightning first.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clmerge.cli.option_table import OptionTable, Type, option_table
from clmerge.cli.option_values import alternatives, item_of, kinds_of
from clmerge.cli.sweep import split_sweep
from clmerge.cli.value_check import OptionError, ValueCheck


def check_arguments(command: str, arguments: Sequence[str], table: OptionTable | None = None) -> list[str]:
    """Refuse what is certainly wrong in the arguments of a command.

    Args:
        command: Name of the command.
        arguments: The words after it.
        table: What there is; default what this version has.

    Returns:
        The words to parse: for ``--stream.source.help CLASS`` without ``--stream``, a stream is named before them.

    Raises:
        OptionError: If an option, class, setting or value is certainly wrong.
    """
    table = table or option_table()
    if command == "sweep":  # whose runs take the options of fit
        own, others = split_sweep(arguments)
        _WordCheck(command, table).words(own)
        return [*own, *check_arguments("fit", others, table)]
    if command not in table.commands:
        return [*arguments]
    check = _WordCheck(command, table)
    check.words(arguments)
    return [*check.implied, *arguments]


class _WordCheck(ValueCheck):
    """The words of one command line.

    Attributes:
        implied: Options that name a class in which the help of a setting is asked for, such as ``--stream``.
    """

    def __init__(self, command: str, table: OptionTable) -> None:
        super().__init__(command, table)
        self.implied: list[str] = []

    def words(self, words: Sequence[str]) -> None:
        position, stray = 0, 0
        asks = any(word.partition("=")[0].endswith(".help") for word in words)
        while position < len(words):
            word = words[position]
            position += 1
            if word == "--" or not word.startswith("--"):
                stray += 1
                if not self.positionals:
                    self._stray(word)
                continue
            name, given, value = word[2:].partition("=")
            appended = name.endswith("+")
            name = name.removesuffix("+")
            kind = self._type_of_word(name)
            following = position
            while following < len(words) and not words[following].startswith("--"):
                following += 1
            if given:
                self._word(name, kind, value, appended=appended)
            elif isinstance(kind, Mapping) and "words" in kind:
                self._need_value(name, following > position)
                position = following
            elif name.endswith(".help") or name == "print_config":
                if following > position:
                    self._help(name, words[position])
                    position += 1
            elif kind != "flag":
                self._need_value(name, following > position)
                self._word(name, kind, words[position], appended=appended)
                position += 1
        needed = [name for name in self.positionals if not name.startswith("[")]
        if len(needed) > stray and not asks:
            first = needed[stray]
            raise OptionError(f"expected {first} after clmerge {self.command}, got none")

    def _stray(self, word: str) -> NoReturn:
        options = [name for name, option in self.options.items() if option["type"] == "config"]
        fits = options and Path(word).suffix in (".yaml", ".yml")
        raise OptionError(
            f"expected options that begin with --, got {word!r}"
            + (f"; did you mean --{options[0]} {word}?" * bool(fits))
        )

    def _need_value(self, name: str, found: bool) -> None:
        if not found:
            raise OptionError(f"expected a value after --{name}, got none")

    def _type_of_word(self, name: str) -> Type:
        """Return the type of an option, "any" for one inside of a class, which ``_nested`` checks."""
        if name in self.options:
            kind: Type = self.options[name]["type"]
            return kind
        if name == "print_config":
            return "any"
        stem = name.removesuffix(".help") if name.endswith(".help") else name
        left_alone = stem.startswith("trainer.") and not self.table.same_versions
        if not (stem in self.options or self._parent(stem) or left_alone):
            known = [f"--{other}" for other, option in self.options.items() if option["type"] != "group"]
            self.unknown(f"an option of clmerge {self.command}", f"--{name}", known)
        return "any"

    def _parent(self, name: str) -> str:
        """Return the option inside of whose class a dotted name is; empty if there is none."""
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            parent = ".".join(parts[:length])
            if parent in self.options and kinds_of(item_of(self.options[parent]["type"])):
                return parent
        return ""

    def _word(self, name: str, kind: Type, value: str, *, appended: bool) -> None:
        if name.endswith(".help"):
            self._help(name, value)
        elif kind == "config":
            self.config(name, value)
        elif name in self.options:
            self.value(self.options[name].get("key", name), item_of(kind) if appended else kind, _parsed(kind, value))
        elif parent := self._parent(name):
            self._nested(parent, name, value)

    def _help(self, name: str, value: str) -> None:
        """Check the class whose help is asked for."""
        stem = name.removesuffix(".help")
        if stem in self.options:
            kinds = kinds_of(item_of(self.options[stem]["type"]))
        else:
            parent, setting = self._parent(stem), stem.rpartition(".")[2]
            outer = self._outer_classes(parent, stem) if parent else []
            types = self._types_of(outer, setting)
            kinds = kinds_of(item_of(types[0])) if types else []
            if kinds and stem == f"{parent}.{setting}" and parent not in self.classes:
                able = [path for path in outer if setting in self.table.settings(path)]
                self.implied.append(f"--{parent}={able[0].rpartition('.')[2]}")
        if kinds:
            self.class_name(stem, kinds, value)

    def _nested(self, parent: str, name: str, value: str) -> None:
        """Check an option inside of a class, for example ``--stream.source.root=x``."""
        outer = self._outer_classes(parent, name)
        setting = name.rpartition(".")[2]
        if not outer or setting in ("class_path", "init_args", "dict_kwargs") or ".dict_kwargs." in name:
            return
        kinds = self._types_of(outer, setting)
        if kinds:
            if len(outer) == 1:
                self.value(name, kinds[0], _parsed(kinds[0], value))
        elif all(map(self.table.is_sure, outer)):
            self.no_setting(outer, f"--{name}", setting)

    def _outer_classes(self, parent: str, name: str) -> list[str]:
        """Return the class that has the last part of a dotted name; all candidates if none was chosen."""
        parts = [part for part in name[len(parent) + 1 :].split(".") if part != "init_args"][:-1]
        key = parent
        found = self._chosen(key, kinds_of(item_of(self.options[parent]["type"])))
        for part in parts:
            if part.isdigit():
                return []
            key = f"{key}.{part}"
            types = self._types_of(found, part)
            kinds = kinds_of(item_of(types[0])) if types else []
            if not kinds:  # a mapping, or an unknown setting
                return []
            found = self._chosen(key, kinds)
        return found

    def _chosen(self, key: str, kinds: Sequence[str]) -> list[str]:
        if key in self.classes:
            path = self.classes[key]
            return [path] if path in self.table.classes else []
        return [path for kind in kinds for path in self.table.kinds[kind].values()]

    def _types_of(self, classes: Iterable[str], setting: str) -> list[Type]:
        return [self.table.settings(path)[setting] for path in classes if setting in self.table.settings(path)]


def _parsed(kind: Type, value: str) -> Any:
    """Return a list or mapping on the command line as such, other values as text."""
    if "str" in alternatives(kind) or kind == "any" or not value.lstrip().startswith(("[", "{")):
        return value
    from clmerge.bounded_yaml import load_yaml

    try:
        return load_yaml(value, "an option")
    except ValueError:
        return None  # the parser says what is wrong with it
