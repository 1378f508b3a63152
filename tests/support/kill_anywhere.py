"""Run a command of clmerge in children that kill themselves (SIGKILL) at chosen shares of what they write.

Called as ``kill_anywhere.py OUT SHARES OPTION ...``: the command with ``--out OUT/whole`` is never killed. Then it is
killed with ``--out OUT/killed`` after every share of the changes to files that it makes, one after the other, and run
to its end. ``OUT/codes.json`` has the exit codes, and whether there was a result after every kill.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program, it does not know the tests

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

from support.kill_driver import forked  # noqa: E402

import clmerge.runs.learner  # noqa: E402
from clmerge.cli import main as clmerge_main  # noqa: E402

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def counted(words, folder, *, last=None, told=None):
    """Run a command, counting changes below a folder; die at the last one, or write the count down."""
    count = 0

    def hook(event, args):
        nonlocal count
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (event in CHANGES or writes) and str(args[0]).startswith(str(folder)):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    code = clmerge_main(words)
    if told is not None:
        told.write_text(str(count))
    return code


def main():
    out, shares, words = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    clmerge.runs.learner.save_plots = lambda results, folder: []  # drawn elsewhere; seconds each
    whole, killed = ([*words, "--out", str(out / name)] for name in ("whole", "killed"))
    codes = [forked(lambda: counted(whole, out, told=out / "count"))]
    count, found = int((out / "count").read_text()), []
    for share in shares:
        codes.append(forked(lambda share=share: counted(killed, out, last=max(1, round(share * count)))))
        found.append((out / "killed").exists())
    codes.append(forked(lambda: clmerge_main(killed)))
    (out / "codes.json").write_text(json.dumps({"codes": codes, "found": found, "count": count}))


if __name__ == "__main__":
    main()
