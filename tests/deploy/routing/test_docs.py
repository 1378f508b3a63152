"""The code of docs/routing.md."""

import re
from pathlib import Path

import torch
from support.routed import images_of, make_frame, routed

from clmerge.deploy.routing import Smile, load_routed
from clmerge.results.model_facts import ModelFacts

PAGE = Path(__file__).parents[3] / "docs" / "routing.md"
LOADING, OWN = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def facts(frame):
    backbone = {"class": "OpenClip", "settings": {"name": frame.backbone.name}}
    return ModelFacts("a+b", "run", backbone, "", "", None, "", ["a"], [])


def test_a_file_of_a_run_is_loaded(tmp_path, monkeypatch):
    frame = make_frame(tmp_path / "clip")
    folder = tmp_path / "runs" / "digits" / "model"
    folder.mkdir(parents=True)
    routed(Smile(rank=2, gate_k=1), frame).float().save(folder / "weight_average+smile.safetensors", facts(frame))
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.zeros(2, 3, 8, 8)}
    exec(compile(LOADING, "docs/routing.md", "exec"), names)
    assert names["logits"].shape == (2, 5)


@torch.no_grad()
def test_a_routing_of_the_readers_own_is_batch_invariant_and_can_be_saved(tmp_path):
    assert len(OWN.splitlines()) <= 40
    names = {"__name__": "my_routers"}
    exec(compile(OWN, "docs/routing.md", "exec"), names)
    frame = make_frame(tmp_path / "clip")
    routing = names["Distances"](rank=2)
    model = routed(routing, frame)
    images = torch.cat([images_of(task, 2) for task in range(3)])
    together = model(images)
    assert model.choices().argmax(dim=1).tolist() == [0, 0, 1, 1, 2, 2]
    for position in range(6):
        assert torch.allclose(model(images[position : position + 1])[0], together[position], atol=1e-11)
    model.save(tmp_path / "own.safetensors", facts(frame))
    assert torch.allclose(load_routed(tmp_path / "own.safetensors")(images), together, atol=1e-11)
    dim = frame.feature_dim
    assert routing.nbytes(frame, [[0]]) - Smile(rank=2, gate_k=1).nbytes(frame, [[0]]) == 4 * dim
