"""``clmerge completion``: the script with which bash or zsh completes commands, options and names of classes."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence

from clmerge.cli.messages import complain
from clmerge.cli.option_table import OptionTable, Type, option_table
from clmerge.cli.option_values import alternatives, item_of, kinds_of

SHELLS = ("bash", "zsh")
EPILOG = """\
For this shell, and for every later one:
  source <(clmerge completion bash)
  clmerge completion bash >> ~/.bash_completion
  clmerge completion zsh > ~/.zfunc/_clmerge      # with fpath+=~/.zfunc before compinit in ~/.zshrc
"""
_FILES = {
    "config",
    "recipe",
    "resume",
    "run_dir",
    "base",
    "models",
    "out",
    "joint",
    "data",
    "verify",
    "key",
    "check",
    "signature",
    "path",
    "RUN",
    "PATH",
}


def build_parser() -> ArgumentParser:
    """Return the parser of ``clmerge completion``."""
    parser = ArgumentParser(
        prog="clmerge completion",
        usage="clmerge completion {bash,zsh}",
        description="Print the script with which a shell completes commands, options, and names of classes. It needs "
        "the package shtab: pip install 'clmerge[completion]'.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash or zsh.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``clmerge completion``; return the exit code."""
    shell = build_parser().parse_args(argv).shell
    try:
        import shtab
    except ImportError:
        error = ValueError(
            "expected the package shtab, got none: pip install 'clmerge[completion]', or pip install shtab"
        )
        return complain("completion", error)
    print(shtab.complete(words_parser(option_table()), shell))
    return 0


def words_parser(table: OptionTable) -> ArgumentParser:
    """Return a parser with the commands, their options, and the names that options take, for completion alone.

    Args:
        table: What there is.
    """
    import shtab

    from clmerge.cli import COMMANDS
    from clmerge.cli.listing import TOPICS

    parser = ArgumentParser(prog="clmerge")
    commands = parser.add_subparsers(dest="command")
    for command, text in COMMANDS.items():
        sub = commands.add_parser(command, help=text)
        for name in table.commands[command]["positionals"]:
            position = sub.add_argument(name.strip("[]").lower(), nargs="?")
            if command == "list":
                position.choices = [*TOPICS]
            elif command == "completion":
                position.choices = SHELLS
            elif name in _FILES:
                position.complete = shtab.FILE  # type: ignore[attr-defined]
        for option, words in _options(table, table.commands[command]["options"]):
            is_flag = words is None
            action = sub.add_argument(f"--{option}", **({"action": "store_true"} if is_flag else {}))  # type: ignore[arg-type]
            if words:
                action.choices = words
            elif option in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _options(table: OptionTable, options: Mapping[str, Mapping[str, Type]]) -> Iterator[tuple[str, list[str] | None]]:
    """Yield the options of a command, those inside of classes too, with the words that each takes; None for a flag."""
    found: dict[str, list[str] | None] = {}
    for name, option in options.items():
        kind = option["type"]
        found[name] = None if kind == "flag" else _words(table, kind)
        for inner, words in _inner(table, kind, depth=2):
            found.setdefault(f"{name}.{inner}", words)
    yield from found.items()


def _inner(table: OptionTable, kind: Type, *, depth: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the settings of all classes of a kind, to a depth; not those of lists, which take classes at a time."""
    if depth == 0 or (item_of(kind) != kind and depth == 2):
        return
    for base in kinds_of(kind):
        for path in table.kinds[base].values():
            for setting, inner in table.settings(path).items():
                yield setting, _words(table, inner)
                for deeper, words in _inner(table, inner, depth=depth - 1):
                    yield f"{setting}.{deeper}", words


def _words(table: OptionTable, kind: Type) -> list[str]:
    """Return the names of classes, choices, and true or false, where a type takes these."""
    found = [name for base in kinds_of(item_of(kind)) for name in table.kinds[base]]
    for one in alternatives(item_of(kind)):
        if isinstance(one, Mapping):
            found += one.get("choices", ())
        elif one == "bool":
            found += ["true", "false"]
    return list(dict.fromkeys(found))
