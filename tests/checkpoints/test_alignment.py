"""Models that did not start from one set of weights are carried into the base's units, and then merged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from support.swap_toy import score, trained
from torch import nn

from clmerge.alignment import ActivationMatching, WeightMatching, barrier, correlations, spec_of
from clmerge.alignment.reparametrization import random_reparametrization
from clmerge.checkpoints.alignment import MatchedAlignment
from clmerge.checkpoints.ledger import read_ledger
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import WeightAverage
from clmerge.models import OpenClip, Timm
from clmerge.weights import save_tensors

CONFIG = """
model: {backbone: BACKBONE, loss_classes: current, head: HEAD}
stream: {class_path: ClassIncremental, init_args: {num_tasks: 2, source: {class_path: SklearnDigits,
  init_args: {test_fraction: 0.1}}}}
learner: {statistics_images: 16}
data: {batch_size: 16}
trainer: {accelerator: cpu}
logging: {wandb: false, csv: false}
"""


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two networks of one task from two initialisations, their files, and the data."""
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train, test = ((data[0][rows], data[1][rows]) for rows in (slice(0, 1200), slice(1200, None)))
    folder, nets = tmp_path_factory.mktemp("experts"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(trained(network(), train, 12, seed))
        save_file(nets[-1].state_dict(), folder / f"{seed}.safetensors")
    return nets, [str(folder / f"{seed}.safetensors") for seed in (0, 1)], train, test


def merged(files, out, alignment=None):
    options = {"models": files, "merger": WeightAverage(), "origin": "zero", "alignment": alignment}
    job = CheckpointMerge(files[0], **options)
    job.run(out)
    return job, load_file(out)


@pytest.mark.parametrize("aligner", [WeightMatching(), ActivationMatching(), ActivationMatching(0.5)])
def test_networks_of_two_initialisations_merge_once_they_are_aligned(experts, aligner, tmp_path):
    nets, files, train, test = experts
    batches = list(train[0][:256].split(64))
    _, naive = merged(files, tmp_path / "naive.safetensors")
    alignment = MatchedAlignment(network(), aligner, lambda: batches, "256 digits")
    job, found = merged(files, tmp_path / "aligned.safetensors", alignment)
    own = [score(net, net.state_dict(), test) for net in nets]
    assert score(network(), naive, test) < min(own) - 0.1
    assert score(network(), found, test) > score(network(), naive, test) + 0.1

    spec, (one, two) = spec_of(nets[0]), (net.state_dict() for net in nets)
    given = correlations(*nets, spec, batches) if aligner.needs_correlations else None
    moved = aligner.match(one, two, spec, correlations=given).apply(two)
    assert all(torch.equal(found[name], (one[name].double() + moved[name].double()).div(2).float()) for name in found)
    same, other = job.ledger.diagnostics["barriers"]
    assert same == {"model": files[0], "before": 0.0, "after": 0.0, "moved": 0.0}
    assert other["before"] == pytest.approx(barrier(nets[0], one, two, batches), rel=1e-6)
    assert other["after"] == pytest.approx(barrier(nets[0], one, moved, batches), rel=1e-6)
    assert other["before"] > 0.5
    assert other["after"] < 0.35
    told = f"barrier {other['before']:.3f} before, {other['after']:.3f} after"
    assert told in job.describe()
    ledger = read_ledger(tmp_path / "aligned.safetensors")
    assert ledger.diagnostics == job.ledger.diagnostics
    assert ledger.alignment["images"] == "256 digits"
    assert verify(tmp_path / "aligned.safetensors")[0] == []


def test_what_was_recorded_is_checked(experts, tmp_path):
    _, files, _, _ = experts
    out = tmp_path / "out.safetensors"
    merged(files, out, MatchedAlignment(network(), WeightMatching(), None, "a network"))
    ledger = read_ledger(out)
    assert ledger.diagnostics["barriers"][1]["before"] is None
    key, other = "hidden.0", ledger.alignment["maps"][0]
    group = ledger.alignment["groups"][key]
    for wrong, message in [
        ({"maps": [other, other]}, "differs from what the merge gives"),
        ({"maps": [other]}, "expected 2 maps"),
        ({"maps": [other, "?"]}, "expected a map of units in the ledger"),
        ({"groups": {key: group | {"axes": []}}}, "expected groups of units with parameters"),
        ({"groups": {key: group | {"size": 10**12}}}, "expected 1000000000000 entries along axis 0"),
        ({"groups": {key: group | {"axes": [{"name": "none", "axis": 0}]}}}, "got none named 'none'"),
    ]:
        ledger.alignment |= wrong
        save_tensors(out, load_file(out), metadata=ledger.metadata())
        try:
            text = "\n".join(verify(out)[0])
        except ValueError as error:
            text = str(error)
        assert message in text
        ledger = read_ledger(out)


def test_what_cannot_be_aligned_is_said(experts, tmp_path):
    _, files, _, _ = experts
    with pytest.raises(ValueError, match="expected images for ActivationMatching"):
        MatchedAlignment(network(), ActivationMatching(), None, "a network")
    save_file({"other.weight": torch.zeros(64, 64), **load_file(files[1])}, tmp_path / "more.safetensors")
    missing = {name: tensor for name, tensor in load_file(files[1]).items() if name != "2.bias"}
    save_file(missing, tmp_path / "less.safetensors")
    alignment = MatchedAlignment(network(), WeightMatching(), None, "a network")
    with pytest.raises(ValueError, match=r"cannot align .*less.safetensors to .*got none named '2.bias'"):
        CheckpointMerge(files[0], models=[tmp_path / "less.safetensors"], merger=WeightAverage(), alignment=alignment)


def moved_copy(model, spec, file):
    hidden = random_reparametrization(spec, torch.Generator().manual_seed(1))
    state = model.state_dict() | hidden.apply({name: model.state_dict()[name] for name in spec.moved_names})
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def test_the_command_merges_permuted_copies_into_the_original(tmp_path, capsys):
    model = OpenClip("nano").model
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "a.safetensors")
    moved_copy(model, spec_of(model), tmp_path / "b.safetensors")
    (tmp_path / "config.yaml").write_text(CONFIG.replace("BACKBONE", "OpenClip").replace("HEAD", "null"))
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    out = tmp_path / "out.safetensors"
    words = ["merge", "--base", files[0], "--models", *files, "--origin", "zero", "--merger", "WeightAverage"]
    words += ["--out", str(out), "--align", "WeightMatching"]
    with pytest.raises(SystemExit):
        main(words)
    assert "expected --data with --align" in capsys.readouterr().err
    assert main([*words, "--data", str(tmp_path / "config.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "aligns  by WeightMatching(" in shown
    assert "barriers on 16 training images of task" in shown
    assert ", 0.000 after" in shown
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())
    assert main(["merge", "--verify", str(out)]) == 0
    assert main(["inspect", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert document["ledger"]["diagnostics"]["barriers"][1]["after"] < 1e-5
    assert "maps" not in document["ledger"]["alignment"]
    assert main(["inspect", str(out)]) == 0
    assert "barrier " in capsys.readouterr().out


def test_classifiers_on_the_features_follow_their_order(tmp_path, capsys):
    backbone = Timm("test_vit", image_size=32)
    state = {name: tensor.contiguous() for name, tensor in backbone.model.state_dict().items()}
    torch.manual_seed(0)
    head = {"head.weight": torch.randn(7, backbone.feature_dim), "head.bias": torch.randn(7)}
    save_file(state | head, tmp_path / "a.safetensors")
    spec = spec_of(backbone.model, readers=[])
    moved_copy(backbone.model, spec, tmp_path / "b.safetensors")
    hidden = random_reparametrization(spec, torch.Generator().manual_seed(1)).maps[spec.outputs].index
    own = load_file(tmp_path / "b.safetensors") | head | {"head.weight": head["head.weight"][:, hidden].contiguous()}
    save_file(own, tmp_path / "b.safetensors")
    timm = "{class_path: Timm, init_args: {name: test_vit, image_size: 32}}"
    (tmp_path / "config.yaml").write_text(CONFIG.replace("BACKBONE", timm).replace("HEAD", "LinearHead"))
    out = tmp_path / "out.safetensors"
    words = ["merge", "--base", str(tmp_path / "a.safetensors"), "--models", str(tmp_path / "b.safetensors")]
    words += ["--merger", "WeightAverage", "--data", str(tmp_path / "config.yaml"), "--out", str(out)]
    assert main([*words, "--align", "ActivationMatching", "--align.weights=0.5"]) == 0
    assert "the order of the features" not in capsys.readouterr().out
    assert all(torch.equal(tensor, (state | head)[name]) for name, tensor in load_file(out).items())

    save_file(own | {"norm2.weight": torch.ones(3)}, tmp_path / "b.safetensors")  # not known to read the features
    save_file(state | head | {"norm2.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    assert main([*words, "--align", "WeightMatching", "--dry-run"]) == 0
    assert "keeps   the order of the features" in capsys.readouterr().out
