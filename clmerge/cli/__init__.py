"""The command line: a lazy dispatcher, so that help is quick and a command imports only what it needs."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import clmerge
from clmerge.cli.option_table import nearest
from clmerge.cli.signals import run_until_stopped
from clmerge.names import tell

COMMANDS = {
    "fit": "train a stream of tasks, merge after every task, evaluate all tasks after every task",
    "sweep": "run fit for several seeds and settings, some at a time",
    "compare": "merge a finished run's task vectors again with any mergers, without training",
    "forget": "take tasks out of a finished run's merged models, and state what was removed",
    "evaluate": "evaluate a finished run's models, or a checkpoint, on its own or another stream",
    "predict": "show the most likely classes of images by a model of a finished run",
    "export": "write a model of a finished run as files that other libraries load",
    "push": "put a model of a finished run on Hugging Face's hub, with a model card",
    "rebase": "carry a finished or half-finished run over to a new base model",
    "merge": "merge checkpoints of any size into one safetensors file",
    "sign": "sign a file or a folder with a key, which clmerge merge --verify checks",
    "inspect": "show what is in a checkpoint, an adapter, a bank, a merged file or a run",
    "list": "show what there is to choose from: mergers, sources, backbones, methods ...",
    "completion": "print the script with which bash or zsh completes words",
    "report": "show on one page which merger is best and why",
}

# Modules that are not called as their command is: in this package, their names would hide Python's own.
_MODULES = {"inspect": "inspection", "list": "listing"}

HELP = f"""\
usage: clmerge COMMAND [options]

Continual learning by model merging: fine-tune task by task, fold every task vector into the running model, see what
was forgotten.

commands:
{chr(10).join(f"  {name:<12}{text}" for name, text in COMMANDS.items())}

options:
  -h, --help   show this text; clmerge COMMAND --help shows a command's options
  --version    show the version
"""


def command_module(command: str) -> ModuleType:
    """Import the module of a command, which has ``build_parser`` and ``main``."""
    return import_module(f"clmerge.cli.{_MODULES.get(command, command)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if it failed, 2 if it was called wrongly, or 128 + the signal that stopped it.

    Raises:
        SystemExit: With 2, if an option of the command is wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(clmerge.__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        near = nearest(command, [*COMMANDS, "--help", "--version"])
        hint = f"; did you mean {near!r}?" if near else ""
        tell(f"clmerge: expected a command ({', '.join(COMMANDS)}), got {command!r}{hint}")
        return 2
    if any(argument in ("-h", "--help") for argument in arguments[1:]):
        print((Path(__file__).parent / "help" / f"{command}.txt").read_text(encoding="utf-8"), end="")
        return 0

    # Read when torch is loaded: waiting threads that spin make a run ten times slower beside other programs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def run() -> int:
        from clmerge.cli.fit import spread_lists
        from clmerge.cli.launch import name_launchers
        from clmerge.cli.own_configs import use_own_configs
        from clmerge.cli.parent import follow_parent
        from clmerge.cli.quick_check import check_arguments
        from clmerge.cli.value_check import OptionError

        follow_parent()
        try:
            words = check_arguments(
                command, name_launchers(_choosing(command, spread_lists(use_own_configs(arguments[1:]))))
            )
        except OptionError as error:
            tell(f"clmerge {command}: {error}")
            raise SystemExit(2) from error
        if command == "fit" and any(word.startswith("--seeds=") for word in words):
            from clmerge.cli.sweep import main as sweep
            from clmerge.cli.sweep import out_for_run_dir

            return sweep(out_for_run_dir(words))
        found: int = command_module(command).main(words)
        return found

    try:
        return run_until_stopped(command, run)
    except Exception as error:
        from clmerge.cli.failures import say

        say(command, error)
        return 1


def _choosing(command: str, words: list[str]) -> list[str]:
    """Write ``--transport auto`` of a rebase as the class that it stands for."""
    if command != "rebase":
        return words
    pairs = zip(["", *words], words, strict=False)
    spelled = ["Auto" if (before, word) == ("--transport", "auto") else word for before, word in pairs]
    return ["--transport=Auto" if word == "--transport=auto" else word for word in spelled]
