import subprocess
import sys

import pytest

from clmerge.cli import COMMANDS, main

pytest.importorskip("shtab")
TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_clmerge
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "clmerge.bash"
    command = [sys.executable, "-m", "clmerge", "completion", "bash"]
    file.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {*COMMANDS}),
        ("com", {"compare", "completion"}),
        ("fit --learner.start", {"--learner.start_policy", "--learner.start_from"}),
        ("fit --learner.start_policy p", {"previous"}),
        ("fit --model.tuning Lo", {"LoRA"}),
        ("fit --model.tuning.rank", {"--model.tuning.rank"}),
        ("fit --stream.source.root", {"--stream.source.root"}),
        ("fit --data.cache_eval ", {"true", "false"}),
        ("fit --mergers Mag", {"MagMax"}),
        ("merge --merger TI", {"TIES"}),
        ("merge --merger.dens", {"--merger.density"}),
        ("list back", {"backbones"}),
        ("completion z", {"zsh"}),
    ],
)
def test_bash_completes(script, words, expected):
    command = ["bash", "-c", TRY, "try", str(script), "clmerge", *words.split(" ")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(found) - {"-h", "--help"} == expected


def test_zsh_has_a_script_too(capsys):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef clmerge")


def test_without_shtab_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'clmerge[completion]'" in capsys.readouterr().err


def test_other_shells_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["completion", "fish"])
    assert stop.value.code == 2
