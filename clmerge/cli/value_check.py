"""Check values against the types of options, and the content of configuration files against the options."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from clmerge.cli.option_table import OptionTable, Type, nearest
from clmerge.cli.option_values import alternatives, in_words, is_null, item_of, kinds_of, may_be, part_of, spoken
from clmerge.cli.own_configs import own_configs_beside
from clmerge.files import is_url
from clmerge.names import visible

_MOST_NAMED = 12
_WRITTEN = frozenset({"out", "run_dir", "csv"})  # options that name what a command writes
_LONGEST = 100  # characters of a value


class OptionError(ValueError):
    """An option, class or value that does not exist; the message is one sentence."""


class ValueCheck:
    """The values of one command.

    Args:
        command: Name of the command.
        table: Its options, and the classes.

    Attributes:
        classes: Import paths of the classes chosen so far, by the key of the option or setting.
    """

    def __init__(self, command: str, table: OptionTable) -> None:
        self.command = command
        self.table = table
        self.options: Mapping[str, Mapping[str, Any]] = table.commands[command]["options"]
        self.positionals: Sequence[str] = table.commands[command]["positionals"]
        self.by_key = {option.get("key", name): option["type"] for name, option in self.options.items()}
        self.classes: dict[str, str] = {}
        self.file = ""  # the configuration that is checked; empty for the command line

    # Values --------------------------------------------------------------------------------------------------------

    def value(self, key: str, kind: Type, value: Any) -> None:
        """Check a value, which is text or the content of a configuration."""
        if key in _WRITTEN and is_url(value):
            raise OptionError(
                f"expected a path of the file system for {self._where(key)}, got {visible(value)}: write to a folder "
                "and copy it there when the command has finished"
            )
        if kind == "flag" or is_null(value) or "any" in alternatives(kind):
            return
        if part_of(kind, "words") is not None:
            if isinstance(value, Mapping) and self.file:  # on the command line it is a word
                self._wrong(key, kind, value)
            return
        base = kinds_of(kind)
        if kind == "group":
            if isinstance(value, Mapping):
                self._mapping(value, f"{key}.")
        elif isinstance(value, Mapping):
            if base:
                self._class(key, base, value)
            elif not kinds_of(item_of(kind)):
                self._wrong(key, kind, value)
        elif isinstance(value, list):
            if (inner := part_of(kind, "list")) is None:
                self._wrong(key, kind, value)
            for item in value:
                self.value(key, inner, item)
        elif base and "str" not in alternatives(kind) and isinstance(value, str):
            self.class_name(key, base, value)
        elif (inner := part_of(kind, "list")) is not None and isinstance(value, str):
            base = kinds_of(inner)
            if base and value.isidentifier():
                self.class_name(key, base, value)
            elif not may_be(kind, value) and not value.isidentifier():
                return
            elif any(isinstance(one, Mapping) and "choices" in one for one in alternatives(kind)):
                self._scalar(key, kind, value)
        else:
            self._scalar(key, kind, value)

    def _scalar(self, key: str, kind: Type, value: Any) -> None:
        if not may_be(kind, value):
            self._wrong(key, kind, value)

    def class_name(self, key: str, kinds: Sequence[str], name: str) -> None:
        """Check the name of a class, and remember it as chosen."""
        known = {known: path for kind in kinds for known, path in self.table.kinds[kind].items()}
        if name in known:
            self._choose(key, known[name])
        elif name in known.values():
            self._choose(key, name)
        elif not name.isidentifier() or Path(name).exists():
            self._choose(key, name)  # a class elsewhere, or a file
        elif all(map(self.table.is_complete, kinds)):
            what = " or ".join(map(spoken, kinds))
            self.unknown(f"the name of {what} for {self._where(key)}", repr(name), known)

    def _choose(self, key: str, path: str) -> None:
        if self.classes.get(key) != path:
            self.classes = {k: p for k, p in self.classes.items() if not k.startswith(f"{key}.")}
        self.classes[key] = path

    def _class(self, key: str, kinds: Sequence[str], value: Mapping[Any, Any]) -> None:
        if "class_path" in value and isinstance(value["class_path"], str):
            self.class_name(key, kinds, value["class_path"])
            if beside := [str(name) for name in value if name not in ("class_path", "init_args", "dict_kwargs")]:
                name = value["class_path"].rpartition(".")[2]
                raise OptionError(
                    f"expected the settings of {name} under init_args, got {beside[0]!r} beside class_path for "
                    f"{self._where(key)}"
                )
        path, given = self.classes.get(key, ""), value.get("init_args")
        if path not in self.table.classes or not isinstance(given, Mapping):
            return
        settings = self.table.settings(path)
        groups = [name for name, inner in given.items() if settings.get(name) == "group" and isinstance(inner, Mapping)]
        flat = {f"{name}.{key}": inner for name in groups for key, inner in given[name].items()}
        for name, inner in {**{name: inner for name, inner in given.items() if name not in groups}, **flat}.items():
            if name in settings:
                self.value(f"{key}.{name}", settings[name], inner)
            elif self.table.is_sure(path) and (name in flat or "." not in str(name)):
                self.no_setting([path], self._where(f"{key}.{name}"), str(name))

    # Configuration files -------------------------------------------------------------------------------------------

    def config(self, name: str, value: str) -> None:
        """Check a configuration, in a file or as text."""
        from clmerge.bounded_yaml import load_yaml, read_yaml

        path = Path(value)
        try:
            if value.lstrip().startswith(("{", "[")) or "\n" in value:
                found = load_yaml(value, f"--{name}")
            elif path.is_file():
                found, self.file = read_yaml(path), value
            elif not path.exists():
                there = [str(path.parent / p.name) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
                self.unknown(f"a file for --{name}", value, there or own_configs_beside(value))
            else:
                return
        except OptionError:
            raise
        except (ValueError, OSError):
            return  # the parser says what is wrong with it
        if isinstance(found, Mapping) and "merge_method" not in found:
            self._mapping(found, "")
        self.file = ""

    def _mapping(self, values: Mapping[Any, Any], prefix: str) -> None:
        for name, value in values.items():
            key = f"{prefix}{name}"
            if key in self.by_key:
                if self.by_key[key] != "config":
                    self.value(key, self.by_key[key], value)
            elif any(known.startswith(f"{key}.") for known in self.by_key):
                if isinstance(value, Mapping):
                    self._mapping(value, f"{key}.")
            elif "." not in str(name) and (prefix != "trainer." or self.table.same_versions):
                tops = {known.partition(".")[0] for known in self.by_key}
                known = [*tops] if not prefix else [k for k in self.by_key if k.startswith(prefix)]
                where = f" in {self.file}" if self.file else ""
                self.unknown(f"an option of clmerge {self.command}{where}", key, known)

    # Messages ------------------------------------------------------------------------------------------------------

    def _where(self, key: str) -> str:
        return f"{key} in {self.file}" if self.file else f"--{key}"

    def _wrong(self, key: str, kind: Type, value: Any) -> NoReturn:
        choices = [c for one in alternatives(kind) if isinstance(one, Mapping) for c in one.get("choices", ())]
        self.unknown(f"{in_words(kind)} for {self._where(key)}", repr(value), choices, quoted=True)

    def unknown(self, what: str, got: str, known: Collection[str], *, quoted: bool = False) -> NoReturn:
        """Raise an error about a word, with the nearest known one."""
        near = nearest(got.strip("'\"").removeprefix("--"), [name.removeprefix("--") for name in known])
        if near is not None and got.startswith("--"):
            near = f"--{near}"
        hint = f"; did you mean {repr(near) if quoted else near}?" if near is not None else ""
        if not hint and not quoted and known:
            few = len(known) <= _MOST_NAMED
            hint = f"; there are {', '.join(known)}" if few else f"; clmerge {self.command} --help names them all"
        raise OptionError(f"expected {what}, got {visible(got)[:_LONGEST]}{hint}")

    def no_setting(self, classes: Sequence[str], where: str, setting: str) -> NoReturn:
        """Raise an error about a setting that none of the classes has."""
        names = sorted({name for path in classes for name in self.table.settings(path)})
        near = nearest(setting, names)
        hint = f"; did you mean {near}?" if near is not None else ""
        if len(classes) == 1:
            name = classes[0].rpartition(".")[2]
            if not hint:
                hint = f"; its settings are {', '.join(names)}" if names else "; it has no settings"
            raise OptionError(f"expected a setting of {name}, got {where}{hint}")
        raise OptionError(f"expected a setting of one of its classes, got {where}{hint}")
