"""Two processes end with what rank zero has learned."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
from torch import nn
from clmerge.deploy.running_merge import RunningMerge
from clmerge.merging import AdaMerging

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Linear(3, 2)

def losses(model, request):
    while True:  # what each process sees differs, as results of two devices do in their last bits
        yield [lambda model: model(torch.eye(3)).square().mean() * (1 + rank)]

merge = RunningMerge(AdaMerging(steps=3, lr=0.01, granularity="task"), losses=losses)
merge.start(model)
for seed in range(2):
    generator = torch.Generator().manual_seed(seed)
    merge.fold({n: torch.randn(t.shape, generator=generator) for n, t in merge.base.items()}, model)
merger = merge.mergers["adamerging"]
print(merger.coefficients["all"].tolist(), merger.losses)
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_every_process_has_the_coefficients_of_rank_zero(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(rank), str(tmp_path / "meet")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert said[0][0].startswith("[")
    assert said[0][0] == said[1][0]
