import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from clmerge.cli import main
from clmerge.cli.merge import progress
from clmerge.merging import TIES
from clmerge.weights import apply_task_vector, task_vector


@pytest.fixture
def files(tmp_path):
    """A base and three models."""
    generator = torch.Generator().manual_seed(0)
    states = [{n: torch.randn(s, generator=generator) for n, s in {"w": (9, 7), "b": (7,)}.items()} for _ in range(4)]
    paths = [tmp_path / name for name in ("base.safetensors", "a.safetensors", "b.safetensors", "c.safetensors")]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    return [str(path) for path in paths]


def arguments(files, *more):
    return ["merge", "--base", files[0], "--models", *files[1:], *more]


def test_merge_and_verify(files, tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    assert main(arguments(files, "--merger", "TIES", "--merger.density=0.4", "--out", out)) == 0
    printed = capsys.readouterr()
    assert "merged       2  in the base and in every model" in printed.out
    assert "MB/s" in printed.err
    base, *models = (load_file(path) for path in files)
    merger = TIES(0.4)
    for model in models:
        merger.update(task_vector(model, base))
    expected = apply_task_vector(base, merger.compute())
    merged = load_file(out)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())

    assert main(["merge", "--verify", out]) == 0
    assert "bit for bit" in capsys.readouterr().out
    content = bytearray((tmp_path / "out.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "out.safetensors").write_bytes(content)
    assert main(["merge", "--verify", out]) == 1
    assert "is NOT what its ledger says" in capsys.readouterr().out


def test_dry_run_writes_nothing(files, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(arguments(files, "--merger", "TIES", "--dry-run", "--out", str(tmp_path / "out.safetensors"))) == 0
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr().out
    assert "memory" in printed
    assert "a pass for the thresholds" in printed
    assert "matrix" not in printed
    assert main(arguments(files, "--merger", "IsoC", "--dry-run")) == 0
    assert "matrix  w: (9, 7)\n" in capsys.readouterr().out


def test_a_recipe_is_the_same(files, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    merger = {"class_path": "TIES", "init_args": {"density": 0.4}}
    content = {"base": files[0], "models": files[1:], "merger": merger, "out": str(tmp_path / "by_recipe.safetensors")}
    recipe.write_text(json.dumps(content))
    assert main(["merge", "--recipe", str(recipe)]) == 0
    out = tmp_path / "out.safetensors"
    assert main(arguments(files, "--merger", "TIES", "--merger.density=0.4", "--out", str(out))) == 0
    assert (tmp_path / "by_recipe.safetensors").read_bytes() == out.read_bytes()
    capsys.readouterr()


def test_a_recipe_with_groups(files, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
base: {files[0]}
models: {files[1:]}
groups:
  - match: [b]
    merger: {{class_path: TIES, init_args: {{density: 0.5}}}}
  - match: [w]
    merger: null
out: {tmp_path / "out.safetensors"}
"""
    )
    assert main(["merge", "--recipe", str(recipe)]) == 0
    base, *models = (load_file(path) for path in files)
    merger = TIES(0.5)
    for model in models:
        merger.update({"b": model["b"] - base["b"]})
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged["b"], base["b"] + merger.compute()["b"])
    assert torch.equal(merged["w"], base["w"])
    assert main(["merge", "--verify", str(tmp_path / "out.safetensors")]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("groups", "hints"),
    [
        ("{match: [w]}", ["expected a list for groups, got {'match': ['w']}"]),
        ("[{match: [w], merger: MagMax}, 3]", ["groups[1]: Expected match and merger"]),
        ("[{match: [w], merger: MagMax}, {mtch: [b]}]", ["groups[1], ", "'mtch'", "did you mean match?"]),
        ("[{match: [w], merger: {class_path: TIES, init_args: {densty: 1}}}]", ["groups[0].merger, ", "mean density?"]),
    ],
)
def test_what_is_wrong_with_a_group_is_said_with_its_number(files, tmp_path, capsys, groups, hints):
    (tmp_path / "recipe.yaml").write_text(f"base: {files[0]}\nmodels: [{files[1]}]\ngroups: {groups}\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["merge", "--recipe", str(tmp_path / "recipe.yaml"), "--dry-run"])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert all(hint in message for hint in [*hints, "recipe.yaml"])


def test_many_groups_take_as_long_each_as_few(files, tmp_path, capsys):
    seconds = {}
    for count in (20, 200):
        names = [f"g{number}" for number in range(count)]
        for file in files:
            save_file({name: torch.randn(2) for name in names}, file)
        groups = [{"match": [name], "merger": "MagMax"} for name in names]
        content = {"base": str(files[0]), "models": [str(files[1])], "groups": groups}
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        started = time.process_time()
        assert main(["merge", "--recipe", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
        seconds[count] = time.process_time() - started
    assert seconds[200] < 10 * seconds[20]
    capsys.readouterr()


def test_an_existing_file_is_kept_unless_told_otherwise(files, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    assert main(arguments(files, "--merger", "MagMax", "--out", str(out))) == 1
    assert out.read_text() == "precious"
    assert "pass --overwrite" in capsys.readouterr().err
    assert main(arguments(files, "--merger", "MagMax", "--out", str(out), "--overwrite")) == 0
    assert set(load_file(out)) == {"w", "b"}


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        (["--merger", "TEIS"], "did you mean TIES?"),
        (["--merger", "TIES", "--merger.densty=0.2"], "did you mean density?"),
        (["--merger", "TIES", "--ot", "x"], "did you mean --out?"),
        (["--merger", "TIES", "--shardsize=5GB"], "did you mean --shard-size?"),
        (["--merger", "TIES"], "got no --out"),
        (["--merger", "TIES", "--verify", "x"], "expected --verify alone"),
    ],
)
def test_wrong_arguments_name_the_nearest(files, more, hint, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments(files, *more))
    assert exit_info.value.code == 2
    assert hint in capsys.readouterr().err


def test_strict_fails_and_writes_nothing(files, tmp_path, capsys):
    save_file({"w": torch.zeros(9, 7), "b": torch.zeros(8)}, files[2])
    out = tmp_path / "out.safetensors"
    assert main(arguments(files, "--merger", "MagMax", "--strict", "--out", str(out))) == 1
    assert "(7,) in the base, (8,) in" in capsys.readouterr().err
    assert not out.exists()
    assert main(arguments(files, "--merger", "MagMax", "--out", str(out))) == 0
    assert "warning: 1 copied, another shape in a model: b" in capsys.readouterr().err


def test_it_imports_no_training_code(files, tmp_path):
    out = str(tmp_path / "out.safetensors")
    code = (
        "import sys; from clmerge.cli import main; "
        f"assert main({arguments(files, '--merger', 'MagMax', '--out', out)!r}) == 0; "
        "names = 'lightning', 'avalanche', 'open_clip', 'timm', 'wandb', 'torch.distributed.tensor'; "
        "print(*[name for name in names if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == ""


def test_help_is_quick(capsys):
    code = "import sys; from clmerge.cli import main; main(['merge', '--help']); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("usage: clmerge merge")
    assert found.stdout.splitlines()[-1] == "False"


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from clmerge.checkpoints import vectors
read = vectors.CheckpointVectors.read
def slowly(self, task, name, piece=None):
    print("reading", flush=True)
    time.sleep(60)
vectors.CheckpointVectors.read = slowly
from clmerge.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "leftovers", "out"),
    [
        (signal.SIGTERM, 0, ["out.safetensors"]),
        (signal.SIGINT, 0, ["out.safetensors"]),
        (signal.SIGHUP, 0, ["out.safetensors"]),
        (signal.SIGKILL, 1, ["out.safetensors"]),
        (signal.SIGTERM, 0, ["out", "--shard-size=100B"]),
    ],
)
def test_a_killed_merge_leaves_no_output(files, tmp_path, number, leftovers, out):
    folder = tmp_path / "results"
    command = [*arguments(files, "--merger", "MagMax", "--out", str(folder / out[0]), *out[1:])]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    while b"reading" not in process.stdout.readline():
        assert process.poll() is None
    assert len(list(folder.iterdir())) == 1
    time.sleep(0.1)
    process.send_signal(number)
    message = process.communicate(timeout=30)[1].decode()
    assert "Traceback" not in message
    assert number == signal.SIGKILL or message.endswith("; nothing was written\n")
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    left = [path.name for path in folder.iterdir()]
    assert len(left) == leftovers
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)


def test_shards(files, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = arguments(files, "--merger", "MagMax", "--out", out, "--shard-size", "100B")
    assert main(command) == 0
    assert main(["merge", "--verify", out]) == 0
    assert capsys.readouterr().out.endswith("is what its ledger says, bit for bit\n")
    assert main(command) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main([*command[:-1], "huge"]) == 1
    assert "expected a size such as 5GB or 500MiB, got 'huge'" in capsys.readouterr().err


def on_a_terminal(action, monkeypatch):
    """Do something with a terminal for stderr; return what it was sent."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    found = bytearray()
    with monkeypatch.context() as patch, os.fdopen(slave, "w") as stderr:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "100")
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        patch.setattr(sys, "stderr", stderr)
        action()
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(master, 1 << 16):
                found.extend(piece)
    os.close(master)
    return found.decode()


def test_a_terminal_shows_a_bar_with_bytes_per_second(monkeypatch):
    def slowly():
        with progress("merging", 10_000_000) as on_bytes:
            for _ in range(3):
                on_bytes(2_000_000)
                time.sleep(0.15)

    shown = on_a_terminal(slowly, monkeypatch)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert re.search(r"merging [\u2501\u2578\u257a ]+ [246]\.0/10\.0 MB [\d.]+ MB/s", plain)
    assert re.search(r"merging: 6\.0 MB in 0\.\d s, \d+ MB/s\r?\n$", plain)


def test_a_merge_on_a_terminal_shows_the_bar(files, tmp_path, monkeypatch):
    command = arguments(files, "--merger", "MagMax", "--out", str(tmp_path / "out.safetensors"))
    shown = on_a_terminal(lambda: main(command), monkeypatch)
    assert "\x1b[2K" in shown  # the bar is wiped away at the end
    assert "merging: 40 %" not in shown
    assert shown.endswith("MB/s\r\n")


def test_without_a_terminal_there_are_plain_lines(capsys):
    with progress("merging", 10_000_000) as on_bytes:
        for _ in range(10):
            on_bytes(1_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == ["merging: 30 %", "merging: 50 %", "merging: 80 %"]
    assert re.fullmatch(r"merging: 10\.0 MB in 0\.\d s, [\d,]+ MB/s", lines[-1])
