"""Pickled modules and TorchScript archives: their parameters are read, and nothing in them is run."""

import io
import os
import pickle
import time
import zipfile

import pytest
import torch
from checkpoints.test_torch_file import Evil, rezipped
from safetensors.torch import load_file, save_file
from support.tiny import tiny_clip
from torch import nn

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.cli import main
from clmerge.merging import WeightAverage
from clmerge.models import OpenClip
from clmerge.models.backbone import load_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")


class Net(nn.Module):
    """Layers, a tied one, a list, buffers of both kinds, and a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.same = self.fc
        self.rest = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.more = nn.ParameterList([nn.Parameter(torch.ones(4))])
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("mask", torch.ones(4), persistent=False)
        self.plain = torch.full((4,), 3.0)
        self.nothing = None

    def forward(self, x):
        x = self.same(self.fc(x)[:, :3])
        for layer in self.rest:
            x = layer(x)
        return x * self.scale + self.table + self.mask + self.plain


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def check(opened, expected):
    assert opened.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(opened[name], tensor), name
        assert opened[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_module_is_its_state_dict(zipped, protocol, net, tmp_path):
    torch.save(net, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    opened = open_checkpoint(tmp_path / "a.pt")
    check(opened, net.state_dict())
    assert opened.kind == f"torch.save of a module {Net.__module__}.Net"
    assert opened.ignored == []
    assert opened.memory("fc.weight") == opened.memory("same.weight")


def test_a_module_beside_other_things(net, tmp_path):
    torch.save({"epoch": 3, "model": net, "model_ema": nn.DataParallel(net), "args": Evil("true")}, tmp_path / "a.pt")
    opened = open_checkpoint(tmp_path / "a.pt")
    check(opened, net.state_dict())
    assert opened.weights == "model_ema"
    assert opened.sets == ["model", "model_ema"]
    assert opened.ignored == ["posix.system"]


@pytest.mark.parametrize("how", ["script", "trace", "half"])
def test_a_torchscript_archive_is_its_state_dict(how, net, tmp_path):
    made = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.ones(2, 3))
    made = made.half() if how == "half" else made
    torch.jit.save(made, str(tmp_path / "a.pt"))
    opened = open_checkpoint(tmp_path / "a.pt")
    check(opened, torch.jit.load(str(tmp_path / "a.pt")).state_dict())
    assert "plain" not in opened
    assert opened.kind.startswith("torch.jit.save of a module")
    assert opened.ignored == []


def test_archives_whose_code_is_missing_give_all_tensors(net, tmp_path):
    torch.jit.save(torch.jit.script(net), str(tmp_path / "a.pt"))
    rezipped(tmp_path / "a.pt", lambda n, c: [] if "/code/" in n else [(n, c)])
    assert open_checkpoint(tmp_path / "a.pt").keys() == {*net.state_dict(), "mask", "plain"}


class Sized(nn.Module):
    """As OpenAI's archives of CLIP, which keep three whole numbers among the buffers."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(3, 2)
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(224))

    def forward(self, x):
        return self.visual(x)


def test_the_sizes_in_archives_of_clip_are_no_weights(tmp_path):
    torch.jit.save(torch.jit.trace(Sized(), torch.ones(1, 3)), str(tmp_path / "a.pt"))
    assert open_checkpoint(tmp_path / "a.pt").keys() == {"visual.weight", "visual.bias"}


def test_frozen_archives_are_refused(net, tmp_path):
    torch.jit.save(torch.jit.freeze(torch.jit.script(net)), str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"the parameters of .*Net in .*a\.pt, got none, as after torch\.jit\.freeze"):
        open_checkpoint(tmp_path / "a.pt")


def test_an_open_clip_model_in_each_of_these_forms_is_merged(tmp_path):
    models = [OpenClip(tiny_clip(tmp_path / str(seed), seed)).model.eval() for seed in range(3)]
    save_file({name: tensor.clone() for name, tensor in models[0].state_dict().items()}, tmp_path / "base.safetensors")
    torch.save(models[1], tmp_path / "whole.pt")
    inputs = torch.zeros(1, 3, *models[2].visual.image_size), torch.zeros(1, models[2].context_length, dtype=torch.long)
    torch.jit.save(torch.jit.trace(models[2], inputs, check_trace=False), str(tmp_path / "script.pt"))
    paths = [tmp_path / "whole.pt", tmp_path / "script.pt"]
    job = CheckpointMerge(tmp_path / "base.safetensors", models=paths, merger=WeightAverage(), strict=True)
    job.run(tmp_path / "out.safetensors")
    backbone = OpenClip(tiny_clip(tmp_path / "0"))
    load_weights(backbone, str(tmp_path / "script.pt"))
    check(backbone.model.state_dict(), models[2].state_dict())
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        mean = (models[1].state_dict()[name].double() + models[2].state_dict()[name].double()) / 2
        assert torch.allclose(tensor.double(), mean, atol=1e-6), name


class Trap(nn.Module):
    """Runs a command when it is unpickled, in each of the ways of a module."""

    def __init__(self, command):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.evil = Evil(command)
        self._modules["evil"] = Evil(command)
        self._parameters["worse"] = Evil(command)
        self._buffers["worst"] = Evil(command)

    def __setstate__(self, state):
        raise AssertionError


class Called(nn.Linear):
    """Is made again by a call that runs a command."""

    def __init__(self, command):
        super().__init__(2, 2)
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,), {"_parameters": dict(self._parameters), "_modules": {}}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("make", [Trap, Called])
def test_a_module_that_runs_a_command_is_not_made(make, zipped, tmp_path, capsys):
    canary = tmp_path / "canary"
    torch.save(make(f"touch {canary}"), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    opened = open_checkpoint(tmp_path / "a.pt")
    assert {name.removeprefix("fc.") for name in opened} == {"weight", "bias"}
    save_file({name: opened[name].clone() for name in opened}, tmp_path / "base.safetensors")
    command = ["merge", "--base", str(tmp_path / "base.safetensors"), "--models", str(tmp_path / "a.pt")]
    assert main([*command, "--merger", "WeightAverage", "--out", str(tmp_path / "out.safetensors")]) == 0
    assert main(["inspect", str(tmp_path / "a.pt")]) == 0
    capsys.readouterr()
    assert not canary.exists()


def test_an_archive_whose_code_or_pickle_runs_a_command_is_read_as_text(net, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(net), str(path))
    code = f"import os\nos.system('touch {canary}')\nclass Net(Module):\n  __parameters__ = []\n".encode()
    rezipped(path, lambda n, c: [(n, code + c if n.endswith(".py") else c)])
    assert open_checkpoint(path).keys() == net.state_dict().keys() | {"mask"}
    evil = pickle.dumps(Evil(f"touch {canary}"), 2)
    for name in ("data.pkl", "constants.pkl"):
        changed = tmp_path / f"{name}.pt"
        changed.write_bytes(path.read_bytes())
        rezipped(changed, lambda n, c, name=name: [(n, evil if n.endswith(f"/{name}") else c)])
        if name == "constants.pkl":
            open_checkpoint(changed)
        else:
            with pytest.raises(ValueError, match=r"an object of posix\.system"):
                open_checkpoint(changed)
    assert not canary.exists()


def test_code_that_is_a_bomb_or_damaged_is_refused(net, tmp_path):
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(net), str(path))
    whole = path.read_bytes()
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            is_code = info.filename.endswith(".py")
            content = b" " * (1 << 25) if is_code else old.read(info)
            new.writestr(info.filename, content, zipfile.ZIP_DEFLATED if is_code else zipfile.ZIP_STORED)
    path.write_bytes(out.getvalue())
    with pytest.raises(ValueError, match=r"at most 16,777,216 bytes of code of .* in .*a\.pt, got more"):
        open_checkpoint(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("test_modules.py"))
    place = info.header_offset + 30 + len(info.filename) + 64
    path.write_bytes(whole[:place] + bytes(32) + whole[place + 32 :])
    with pytest.raises(ValueError, match=r"expected the code of .* in .*a\.pt, got "):
        open_checkpoint(path)


def test_modules_that_hold_each_other_or_grow_without_end_are_refused(tmp_path):
    knot = nn.Module()
    knot._modules["a"] = nn.Module()
    knot._modules["a"]._modules["b"] = knot
    laughs = nn.Linear(1, 1)
    for _ in range(40):
        outer = nn.Module()
        outer._modules |= {"a": laughs, "b": laughs}
        laughs = outer
    started = time.process_time()
    for module in (knot, laughs):
        torch.save(module, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"at most 100,000 parts, 100 deep, in .*a\.pt, got more, or modules that"):
            open_checkpoint(tmp_path / "a.pt")
    assert time.process_time() - started < 10
