"""Hostile names and damaged documents for `clmerge report`: a whole page, or one message that names the file.

    python scripts/checks/fuzz_report.py [--seed 0] [--seconds 120 | --documents N] [--run RUN --compare COMPARE]

A finished run and a comparison of it (made here with one short fit, or given) are copied. Names of tasks, classes,
models, layers, folders and titles are replaced by markup, formulas, mathematics, LaTeX, marks that turn the line and
terminal escapes; results.json, config.yaml and manifest.json are changed at random places or in random bytes. What must
come of it is one of

- a page: one script, no handlers, no addresses but data:, no element that the template does not have, no control
  character; no CSV cell that a spreadsheet takes for a formula; all pictures of all charts;
- a table: no command of LaTeX and no markup of Markdown that the names brought;
- a message: one line of at most 700 characters on stderr, exit code 1, and nothing left behind.

What is printed has no control characters. Prints one line, and every kind of fault before it; exits with 1 if there is
one.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(2)</script>",
    "</title><svg onload=alert(3)>",
    "javascript:alert(4)",
    "{{ 7*7 }}{% raw %}",
    "--><b>",
    "&lt;b&gt;",
    "=1+1",
    "=cmd|'/c calc'!A0",
    "@SUM(A1)",
    "+1-1",
    "-2+3",
    "\t=1",
    "\uff1d1+1",
    "\\input{/etc/passwd}",
    "\\write18{id}",
    "$$x^2$$",
    "$\\frac{1}{$",
    "[2pt]",
    "*",
    "%comment",
    "a|b\nc",
    "\x1b[31mred\x1b[0m",
    "\x9b31m",
    "\u202eevil",
    "\u2066\u2028",
    "../../../etc/passwd",
    "a/b",
    "\0nul",
    "x" * 3000,
    "",
    " ",
    "_hidden",
    "\u4e2d\u6587 \u05d0\u05d1 \U0001f600",
    "\ud800",
    "NaN",
    "]]>",
    "url(http://127.0.0.1/x)",
    "expert@x",
    "ties (tuned)",
)
ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    2,
    1e308,
    "x",
    "NaN",
    [],
    {},
    [None],
    [[0.5]],
    [1, 2, 3],
    {"a": 1},
    "<b>",
    10**400,
    float("nan"),
)
CONFIG = """\
name: fuzzed
stream:
  class_path: ClassIncremental
  init_args: {source: {class_path: SklearnDigits, init_args: {test_fraction: 0.05}}, num_tasks: 3, val_fraction: 0.1}
model:
  backbone: OpenClip
  optimizer: {class_path: AdamW, init_args: {lr: 2e-4}}
mergers: [MagMax, TIES]
data: {batch_size: 32}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 3, limit_val_batches: 1}
logging: {wandb: false}
"""
ELEMENTS = re.compile(
    "html|head|meta|title|style|body|header|p|h[123]|nav|div|input|label|main|section|span|small|svg|path|circle|rect|text|"
    "g|button|figure|figcaption|details|summary|table|thead|tbody|tr|th|td|dl|dt|dd|pre|code|footer|script|a"
)


class Page(HTMLParser):
    """What is on a page that must not be there."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.bad: list[str] = []
        self.scripts = 0
        self.feed(text)
        if self.scripts != 1:
            self.bad.append(f"{self.scripts} scripts")

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if not ELEMENTS.fullmatch(tag):
            self.bad.append(f"<{tag}>")
        for name, value in attributes:
            if name.startswith("on"):
                self.bad.append(f"{tag} {name}=")
            if name in ("href", "src", "action", "formaction", "xlink:href") and not (value or "").startswith(
                "data:text/csv"
            ):
                self.bad.append(f"{tag} {name}={(value or '')[:60]!r}")
            if name == "style" and "url(" in (value or ""):
                self.bad.append(f"style {(value or '')[:60]}")


class Fuzzer:
    """Damage copies of a run and of its comparison, report them, and look at what comes of it."""

    def __init__(self, work: Path, run: Path, compare: Path, seed: int, draw_every: int = 144) -> None:
        self.work, self.rng, self.draw_every = work, random.Random(seed), draw_every
        self.originals = {"run": run, "compare": compare}
        self.counts: Counter[str] = Counter()
        self.faults: dict[str, list[int]] = {}

    def one(self, number: int) -> dict[str, Any]:
        """Try one document; return what is known of it."""
        inputs, out = self.work / "in", self.work / "out"
        for folder in (inputs, out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        kind = (
            "names"
            if number % 12 == 0
            else self.rng.choice(["results"] * 6 + ["compare"] * 6 + ["config", "manifest", "bytes"])
        )
        folders = self.copies(inputs, plain=kind != "names")
        self.damage(kind, folders)
        form = "html" if number % self.draw_every == 0 else self.rng.choice(["md", "latex", "html"])
        # Drawing takes a hundred times longer than all the rest.
        drawn = number % self.draw_every == 0 or form != "html"
        target = out / ("report.html" if form == "html" else "table.txt")
        title = ["--title=" + self.rng.choice([name for name in HOSTILE if "\0" not in name])] if form == "html" else []
        named = self.rng.choice([["run"], ["compare"], ["run", "compare"], ["compare", "run"]])
        arguments = ["report", *(str(folders[name]) for name in named), "--format", form, "--out", str(target)]
        with contextlib.nullcontext() if drawn else without_pictures():
            code, printed, error = called([*arguments, *title])
        if error:
            bad = [f"traceback: {re.sub(r'[0-9]+', 'N', error)}"]
        elif code == 0:
            bad = page_faults(out) if form == "html" else table_faults(target, form)
        else:
            bad = message_faults(printed, kind)
        self.counts[
            "tracebacks" if error else ("pages" if form == "html" else "tables") if code == 0 else "messages"
        ] += 1
        if code and any(out.iterdir()):
            bad.append(f"left behind: {sorted(path.name for path in out.iterdir())[:3]}")
        if [path for path in self.work.rglob("*.tmp")] or {path.name for path in self.work.iterdir()} - {"in", "out"}:
            bad.append("files outside of the output")
        if re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed):
            bad.append(f"control characters printed: {printed[:100]!a}")
        for fault in bad:
            self.faults.setdefault(f"{kind}: {fault.encode('ascii', 'backslashreplace').decode()[:200]}", []).append(
                number
            )
        return {
            "number": number,
            "kind": kind,
            "form": form,
            "code": code,
            "bad": bad,
            "error": error,
            "printed": printed[-700:],
        }

    def copies(self, inputs: Path, *, plain: bool) -> dict[str, Path]:
        """Copy both folders; the comparison says that it is one of the copy."""
        odd = ["run <b>x", "=1+1", "a'\"b", "run&amp;", "$x$", "\x1b[1m", "\u202ex"]
        folders = {name: inputs / (name if plain else f"{name} {self.rng.choice(odd)}") for name in self.originals}
        for name, folder in folders.items():
            folder.mkdir()
            for file in ("results.json", "config.yaml", "manifest.json"):
                if (self.originals[name] / file).is_file():
                    shutil.copyfile(self.originals[name] / file, folder / file)
        document = json.loads((folders["compare"] / "results.json").read_text(encoding="utf-8"))
        for entry in document["runs"]:
            entry["path"] = str(folders["run"])
        (folders["compare"] / "results.json").write_text(json.dumps(document), encoding="utf-8")
        return folders

    def damage(self, kind: str, folders: dict[str, Path]) -> None:
        """Damage one kind of file in place."""
        if kind == "names":
            for folder in folders.values():
                self.rewrite(folder / "results.json", lambda document: renamed(document, self.rng))
            config = folders["run"] / "config.yaml"
            config.write_text(
                f"{config.read_text(encoding='utf-8')}# {self.rng.choice(HOSTILE[:8])}\n", encoding="utf-8"
            )
        elif kind == "bytes":
            file = self.rng.choice(
                [folders["run"] / "results.json", folders["run"] / "config.yaml", folders["compare"] / "results.json"]
            )
            data = bytearray(file.read_bytes())
            for _ in range(self.rng.choice([1, 3, 30])):
                data[self.rng.randrange(len(data))] = self.rng.randrange(256)
            file.write_bytes(
                self.rng.choice([bytes(data), bytes(data[: self.rng.randrange(len(data))]), b"[" * 100_000, b""])
            )
        elif kind == "config":
            import yaml

            file = folders["run"] / "config.yaml"
            changed = mutated(yaml.safe_load(file.read_text(encoding="utf-8")), self.rng)
            file.write_text(yaml.safe_dump(changed), encoding="utf-8")
        else:
            file = {"results": folders["run"] / "results.json", "manifest": folders["run"] / "manifest.json"}.get(kind)
            if file is None:
                file = folders["compare"] / "results.json"
            self.rewrite(
                file, lambda document: mutated(document, self.rng, first="runs" if kind != "manifest" else "results")
            )

    @staticmethod
    def rewrite(file: Path, change: Any) -> None:
        file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


def renamed(document: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Give hostile names to everything that has one, the same name to what had the same."""
    (run,) = document["runs"]
    names = set(run["tasks"]) | {name for row in run["classes"] for name in row}
    names |= {model for model in run["models"] if model not in ("expert", "zero_shot")}
    chosen = dict(zip(sorted(names), rng.sample(HOSTILE, len(HOSTILE)) * 9, strict=False))

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {chosen.get(key, key): walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return chosen.get(value, value) if isinstance(value, str) else value

    return walk(document)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with every one of its keys, at any depth."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, child in items:
        yield value, key
        yield from places(child)


def mutated(document: Any, rng: random.Random, first: str | None = None) -> Any:
    """Change one to three random places of a document, near its top or below one key more often than elsewhere."""
    new = copy.deepcopy(document)
    every, top = list(places(new)), [(new, key) for key in new]
    below = list(places(new[first])) if first in new else every
    for _ in range(rng.choice([1, 1, 1, 3])):
        holder, key = rng.choice(top if rng.random() < 0.15 else below if rng.random() < 0.8 else every)
        with contextlib.suppress(KeyError, IndexError):  # an earlier change has removed it
            if rng.random() < 0.3:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return new


def called(arguments: list[str]) -> tuple[int, str, str | None]:
    """Run the command in this process; return exit code, what it printed, and the place of an exception."""
    from clmerge.cli import main as command

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            return int(command(arguments)), printed.getvalue(), None
        except SystemExit as stop:
            return int(stop.code or 0), printed.getvalue(), None
        except Exception as found:
            own = [frame for frame in traceback.extract_tb(found.__traceback__) if "clmerge" in frame.filename]
            place = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "?"
            return 1, printed.getvalue(), f"{type(found).__name__} in {place}: {str(found)[:100]}"


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """Write a page with its tables, and empty files for its pictures."""
    with mock.patch("clmerge.report.draw"), mock.patch("clmerge.report.to_png", return_value=b""):
        yield


def page_faults(folder: Path) -> list[str]:
    """Say what is wrong with a page and its tables."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    bad = Page(text).bad
    if "Content-Security-Policy" not in text:
        bad.append("no policy")
    if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text):
        bad.append("control characters on the page")
    for file in folder.rglob("*.csv"):
        for row in csv.reader(io.StringIO(file.read_text(encoding="utf-8"))):
            for cell in row:
                formula = cell[:1] in ("=", "@", "+", "\t", "\r", "\uff1d") or (
                    cell[:1] == "-" and not re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell)
                )
                if formula:
                    bad.append(f"formula in {file.name}: {cell[:20]!r}")
    tables, pictures = (
        {path.with_suffix("") for path in folder.rglob(f"*.{kind}") if path.stem not in ("models", "classes")}
        for kind in ("csv", "png")
    )
    if tables != pictures or not pictures:
        bad.append(f"{len(tables)} tables, {len(pictures)} pictures")
    return list(dict.fromkeys(bad))


def table_faults(file: Path, form: str) -> list[str]:
    """Say what is wrong with a table for a paper."""
    text = file.read_text(encoding="utf-8")
    if form == "md":
        return [f"markup {found[0]!r}" for found in re.finditer(r"(?<!\\)<\w+|(?<!\\)\$|(?<!\\)`|\]\(", text)][:1]
    known = r"\\(begin|end|centering|caption|[tmb]\w+rule|textbf|small|pm|text\w+|[&%$#_{}\\])"
    commands = [found[0] for found in re.finditer(r"\\([A-Za-z]+|.)", text)]
    bad = [f"command {command!r}" for command in commands if not re.fullmatch(known, command)][:1]
    return bad + [f"argument {found[0]!r}" for found in re.finditer(r"(\\\\|\\\w+rule)\s*[\[*]", text)][:1]


def message_faults(printed: str, kind: str) -> list[str]:
    """Say what is wrong with a message."""
    lines = [
        line
        for line in printed.splitlines()
        if not line.startswith("clmerge report: ") or " holds a comparison" not in line
    ]
    bad = []
    if len(lines) != 1 or not lines[0].startswith("clmerge report: ") or len(lines[0]) > 700:
        bad.append(f"{len(lines)} lines, the first {lines[0][:120] if lines else ''!r}")
    if kind in ("results", "compare", "bytes") and not re.search(
        r"results\.json|config\.yaml|at least one finished", printed
    ):
        bad.append(f"no file named: {re.sub(r'[0-9]+', 'N', printed)[:150]}")
    return bad


def make_folders(work: Path) -> tuple[Path, Path]:
    """Train three tiny tasks and compare two mergers on them."""
    from clmerge.cli import main as command

    run = work / "run"
    (work / "config.yaml").write_text(CONFIG, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        jobs = [["fit", "--config", str(work / "config.yaml"), "--run_dir", str(run)]]
        compare = [
            "compare",
            str(run),
            "--mergers",
            "MagMax",
            "TIES",
            "OPCM",
            "--scale",
            "0.5,1.0",
            "--grid",
            "TIES.density=0.1,0.2",
        ]
        jobs.append([*compare, "--orders", "2", "--diagnose"])
        for job in jobs:
            if code := command(job):
                raise SystemExit(f"fuzz_report: {' '.join(job)} ended with {code}")
    return run, run / "compare"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--documents", type=int, help="how many, however long they take")
    parser.add_argument("--run", type=Path, help="a finished run")
    parser.add_argument("--compare", type=Path, help="a comparison of it")
    parser.add_argument("--log", type=Path, help="a file to add a JSON line per document to")
    options = parser.parse_args()
    if (options.run is None) != (options.compare is None):
        parser.error("expected --run with --compare, or neither")
    with tempfile.TemporaryDirectory(prefix="fuzz_report.") as folder:
        work = Path(folder)
        (work / "tried").mkdir()
        run, compare = (options.run, options.compare) if options.run else make_folders(work)
        fuzzer = Fuzzer(work / "tried", run, compare, options.seed)
        started, number = time.monotonic(), 0
        while number < options.documents if options.documents else time.monotonic() - started < options.seconds:
            known = fuzzer.one(number)
            if options.log:
                with options.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(known) + "\n")
            number += 1
        seconds = time.monotonic() - started
    for fault, numbers in fuzzer.faults.items():
        print(f"  FAULT x{len(numbers)} (document {numbers[0]}) {fault}", file=sys.stderr)
    shown = ", ".join(f"{count} {what}" for what, count in sorted(fuzzer.counts.items()))
    total = sum(map(len, fuzzer.faults.values()))
    print(f"fuzz_report: {number} documents in {seconds:.0f} s (seed {options.seed}): {shown}; {total} faults")
    return 1 if fuzzer.faults or not number else 0


if __name__ == "__main__":
    raise SystemExit(main())
