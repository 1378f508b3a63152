"""Write again what is generated from the code.

These are the help texts of the commands, the table of options and classes, and the README's table of mergers.

python scripts/update_generated.py          write
python scripts/update_generated.py --check  exit with 1 if something is out of date
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from option_table import option_table

from clmerge.cli import COMMANDS, command_module
from clmerge.cli.option_table import FILE

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- mergers: begin -->", "<!-- mergers: end -->"


def plain(text: str) -> str:
    """Write an option's value once, as argparse does from Python 3.13 on, so that all versions give one text."""
    return re.sub(r"(--[\w.]+) (\S+), (--[\w.]+\+) \2", r"\1, \3 \2", text)


def command_help(command: str, **options: Any) -> str:
    """Return the help of a command at a width of 100 columns."""
    os.environ["COLUMNS"] = "100"
    return plain(command_module(command).build_parser(**options).format_help())


def merger_table() -> str:
    """Return the mergers as a Markdown table."""
    from clmerge.merging import registered_mergers

    lines = ["| merger | what it does | source | exact online | order-free |", "|---|---|---|---|---|"]
    for name, merger in sorted(registered_mergers().items(), key=lambda item: item[0].lower()):
        source = f"[{merger.source}](https://arxiv.org/abs/{merger.source})" if merger.source else ""
        exact, free = ("yes" if flag else "no" for flag in (merger.exact_online, merger.order_free))
        lines.append(f"| `{name}` | {merger.summary} | {source} | {exact} | {free} |")
    return "\n".join(lines)


def generated() -> dict[Path, str]:
    """Return the generated files and what they should hold."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    # The Trainer's three hundred lines are left to Lightning.
    helps = {command: command_help(command, **({"trainer": False} if command == "fit" else {})) for command in COMMANDS}
    return {
        **{ROOT / "clmerge" / "cli" / "help" / f"{command}.txt": text for command, text in helps.items()},
        FILE: json.dumps(option_table(), indent=1, ensure_ascii=False) + "\n",
        readme: f"{before}{BEGIN}\n{merger_table()}\n{END}{after}",
    }


def main() -> int:
    """Write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    wanted = generated()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(wanted[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
