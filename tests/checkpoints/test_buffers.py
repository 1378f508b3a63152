"""Running statistics of batch normalisation: fit, the callback and merge give the same for the same policy."""

import json
import shutil

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clmerge import MergeCallback
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import MagMax
from clmerge.models import Timm
from clmerge.statistics.measure import training_images
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule

SIZES = {"layers": [1, 1, 1, 1], "channels": [4, 4, 6, 6], "stem_width": 4}
CONFIG = """
name: small
stream: {{class_path: ClassIncremental, init_args: {{source: SklearnDigits, num_tasks: 2, val_fraction: 0.1}}}}
model:
  backbone:
    class_path: Timm
    init_args: {{name: "local-dir:{folder}", checkpoint: {folder}/model.safetensors}}
  head: LinearHead
  optimizer: {{class_path: AdamW, init_args: {{lr: 1e-2}}}}
mergers: [MagMax]
data: {{batch_size: 64, eval_batch_size: 64}}
learner: {{statistics_images: 96}}
trainer: {{max_epochs: 1, accelerator: cpu, limit_train_batches: 3, limit_val_batches: 1}}
logging: {{wandb: false, csv: false}}
"""
POLICIES = ["latest", "mean", "base", "re-estimated"]


def statistics(state):
    return {name: tensor for name, tensor in state.items() if "running_" in name}


def counts(state):
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" in name}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A residual network of timm with statistics of an earlier life, and a configuration that trains it."""
    folder = tmp_path_factory.mktemp("resnet")
    settings = {
        "architecture": "resnet18",
        "num_classes": 3,
        "model_args": SIZES,
        "pretrained_cfg": {"input_size": [3, 16, 16], "classifier": "fc"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model("resnet18", num_classes=3, **SIZES)
        for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            norm.num_batches_tracked.fill_(7)
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "fit.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """A run of ``fit`` under every policy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        for policy in POLICIES:
            run = str(folder / policy)
            patch.delenv("CLMERGE_RUN_DIR", raising=False)
            command = ["fit", "--config", str(folder / "fit.yaml"), "--run_dir", run, f"--learner.buffers={policy}"]
            assert main(command) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return folder


def merge(folder, models, *options):
    base = str(folder / "model.safetensors")
    return main(["merge", "--base", base, "--models", *map(str, models), "--merger", "MagMax", *options])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_merged_to_the_statistics_that_fit_gave(policy, runs, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert merge(runs, [runs / policy], f"--buffers={policy}", "--out", str(out)) == 0
    found, expected = load_file(out), load_file(runs / policy / "model" / "magmax.safetensors")
    assert len(statistics(found)) >= 10
    assert same(statistics(found), statistics(expected))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if name not in counts(expected))
    base = load_file(runs / "model.safetensors")
    assert same(counts(found), counts(base if policy == "base" else expected))
    assert all(tensor.dtype == torch.int64 for tensor in counts(found).values())
    assert same(statistics(found), statistics(base)) == (policy == "base")
    differences, ledger = verify(out)
    assert differences == []
    assert ledger.buffers == policy
    kept = {f"unmerged/task_{task:03d}.safetensors" for task in {"mean": (0, 1), "base": ()}.get(policy, (1,))}
    assert {"/".join(file.path.split("/")[-2:]) for file in ledger.files if "/unmerged/" in file.path} == kept


def test_what_images_gave_is_named_and_not_replayed(runs, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert merge(runs, [runs / "latest"], "--buffers=re-estimated", "--no-hash", "--out", str(out)) == 0
    names = list(statistics(load_file(out)))
    assert "measures on 96 training images of task" in capsys.readouterr().out
    shutil.move(runs / "fit.yaml", runs / "away.yaml")  # nothing but the files of the merge is read
    try:
        assert main(["merge", "--verify", str(out)]) == 0
    finally:
        shutil.move(runs / "away.yaml", runs / "fit.yaml")
    told = capsys.readouterr().out
    assert f"not replayed: {len(names)} running statistics, from 96 training images of task" in told
    assert "what its ledger says, bit for bit but for what images gave" in told

    # A ledger that calls a merged tensor estimated hides nothing.
    with safe_open(out, "pt") as opened:
        ledger = json.loads(opened.metadata()["clmerge"])
    ledger["estimated"].append("conv1.weight")
    save_file(load_file(out) | {"conv1.weight": torch.zeros(4, 3, 7, 7)}, out, {"clmerge": json.dumps(ledger)})
    assert main(["merge", "--verify", str(out)]) == 1
    told = capsys.readouterr().err
    assert "names other estimated tensors" in told
    assert "'conv1.weight' of" in told


def test_a_configuration_gives_what_a_run_of_it_gives(runs, tmp_path):
    paths = []
    for options in ([], ["--data", str(runs / "fit.yaml")]):
        paths.append(tmp_path / f"{len(options)}.safetensors")
        assert merge(runs, [runs / "latest"], "--buffers=re-estimated", *options, "--out", str(paths[-1])) == 0
    assert same(load_file(paths[0]), load_file(paths[1]))


class Foreign(LightningModule):
    """Somebody's module around the same network."""

    def __init__(self, folder):
        super().__init__()
        self.net = timm.create_model("resnet18", num_classes=3, **SIZES)
        self.net.load_state_dict(load_file(folder / "model.safetensors"))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoints_are_merged_to_the_statistics_that_the_callback_gives(policy, folder, tmp_path):
    module = Foreign(folder)
    transform = Timm(f"local-dir:{folder}").eval_transform
    data = StreamDataModule(64, eval_batch_size=64)
    data.seed = 0
    data.setup_stream(ClassIncremental(SklearnDigits(), num_tasks=2, val_fraction=0.1), transform, transform)
    merger = MergeCallback(
        MagMax(),
        buffers=policy,
        images=lambda model: training_images(model, data, 1, num_images=96, seed=0),
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for task in range(2):
        generator = torch.Generator().manual_seed(task)
        images = TensorDataset(torch.randn(12, 3, 32, 32, generator=generator), torch.arange(12) % 3)
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[merger], enable_model_summary=False, **options)
        trainer.fit(module, DataLoader(images, batch_size=4))
        trainer.save_checkpoint(tmp_path / f"{task}.ckpt")
    out = tmp_path / "m.safetensors"
    more = ["--data", str(folder / "fit.yaml")] if policy == "re-estimated" else []
    command = [f"--buffers={policy}", *more, "--out", str(out)]
    assert merge(folder, [tmp_path / "0.ckpt", tmp_path / "1.ckpt"], *command) == 0
    expected = {name.removeprefix("net."): tensor for name, tensor in merger.merged_state().items()}
    if policy == "latest":  # the module's own
        expected |= {name: tensor for name, tensor in module.net.state_dict().items() if name not in expected}
    found = load_file(out)
    assert same(statistics(found), statistics(expected))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {int(count) for count in counts(found).values()} == ({7} if policy == "base" else {7 + 6})
    assert verify(out)[0] == []


@pytest.fixture
def models(folder, tmp_path):
    """Two models of the architecture with statistics of their own."""
    paths = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        state = load_file(folder / "model.safetensors")
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(state, paths[-1])
    return paths


def test_by_default_they_are_the_bases_and_a_line_says_that_the_models_have_others(folder, models, tmp_path, capsys):
    assert merge(folder, models, "--out", str(tmp_path / "m.safetensors")) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "--buffers" in line]
    assert len(told) == 1
    assert str(models[0]) in told[0]
    base = load_file(folder / "model.safetensors")
    assert same(statistics(load_file(tmp_path / "m.safetensors")), statistics(base))
    assert merge(folder, models, "--buffers=base", "--dry-run") == 0
    assert "--buffers" not in capsys.readouterr().out
    states = [{**load_file(path), **statistics(base)} for path in models]
    for path, state in zip(models, states, strict=True):
        save_file(state, path)
    assert merge(folder, models, "--dry-run") == 0
    assert "--buffers" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "row"),
    [
        ("latest", "taken       26  running statistics of the last model"),
        ("mean", "averaged    26  running statistics, over the models"),
        ("re-estimated", "measured    26  running statistics, on training images"),
        ("base", "copied      26  running statistics"),
    ],
)
def test_a_dry_run_says_what_becomes_of_them(policy, row, folder, models, capsys):
    more = ["--data", str(folder / "fit.yaml")] if policy == "re-estimated" else []
    assert merge(folder, models, f"--buffers={policy}", *more, "--dry-run") == 0
    told = capsys.readouterr().out
    assert row in told
    assert ("measures on 96 training images of task" in told) == bool(more)
    assert ("and the merged model to measure on" in told) == bool(more)


def test_patterns_and_dtypes_count_for_statistics_too(folder, models, tmp_path):
    out = tmp_path / "m.safetensors"
    save_file({name: t.half() if "running_" in name else t for name, t in load_file(models[0]).items()}, models[0])
    job = CheckpointMerge(
        folder / "model.safetensors",
        models=models,
        merger=MagMax(),
        buffers="mean",
        exclude=["layer1.*"],
        dtype="bfloat16",
    )
    job.run(out)
    found, base, (a, b) = load_file(out), load_file(folder / "model.safetensors"), map(load_file, models)
    for name, tensor in statistics(found).items():
        mean = base[name] if name.startswith("layer1.") else (a[name].float() + b[name]) / 2
        torch.testing.assert_close(tensor, mean.bfloat16(), rtol=0.01, atol=1e-6)
    assert verify(out)[0] == []


def test_a_statistic_that_a_model_lacks_stays_the_bases_with_a_warning(folder, models, tmp_path, capsys):
    state = load_file(models[1])
    del state["bn1.running_mean"]
    save_file(state, models[1])
    assert merge(folder, models, "--buffers=mean", "--out", str(tmp_path / "m.safetensors")) == 0
    assert "running statistics that a model does not have: bn1.running_mean" in capsys.readouterr().err
    found, base = load_file(tmp_path / "m.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(found["bn1.running_mean"], base["bn1.running_mean"])
    assert merge(folder, models, "--buffers=mean", "--strict", "--dry-run") == 1


def without(models, part):
    for path in models:
        save_file({name: tensor for name, tensor in load_file(path).items() if part not in name}, path)


def test_what_cannot_be_done_is_refused_and_leaves_nothing(folder, models, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    config = tmp_path / "fit.yaml"

    def refused(*options, code=1):
        if code == 2:
            with pytest.raises(SystemExit, match="2"):
                merge(folder, models, *options, "--out", str(out))
        else:
            assert merge(folder, models, *options, "--out", str(out)) == code
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))
        return capsys.readouterr().err

    assert "got neither; leave them out" in refused("--data", str(folder / "fit.yaml"), code=2)
    assert f"expected a run folder as the last of --models for --buffers re-estimated, got {models[1]}" in refused(
        "--buffers=re-estimated"
    )
    assert "gone.yaml, which is no file" in refused("--buffers=re-estimated", "--data", str(tmp_path / "gone.yaml"))
    for text, message in (
        ("seed: 1", "fit.yaml"),
        ((folder / "fit.yaml").read_text().replace("AdamW", "shutil.rmtree"), "--allow shutil"),
        ((folder / "fit.yaml").read_text().replace("local-dir:", "").replace(f'"{folder}"', "test_vit"), "test_vit"),
    ):
        config.write_text(text)
        found = refused("--buffers=re-estimated", "--data", str(config))
        assert message in found
        assert "Traceback" not in found
        assert len(found.splitlines()) <= 2

    state = load_file(models[1])
    state["bn1.running_var"][0] = torch.nan
    save_file(state, models[1])
    assert "NaN or Inf in 'bn1.running_var'" in refused("--buffers=latest")
    without(models[1:], "running_")
    assert f"got none in {models[1]}" in refused("--buffers=mean")
    assert "not left out, for --buffers mean, got none" in refused("--buffers=mean", "--include", "*.weight")


def test_merged_weights_that_overflow_on_images_are_an_error(folder, models, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    for path in models:
        save_file({name: t * 1e30 if name == "conv1.weight" else t for name, t in load_file(path).items()}, path)
    options = ["--buffers=re-estimated", "--data", str(folder / "fit.yaml"), "--out", str(out)]
    assert merge(folder, models, *options) == 1
    assert "expected finite running statistics of the merged weights" in capsys.readouterr().err
    assert not out.exists()


def test_another_network_than_that_of_the_configuration_is_refused(folder, tmp_path, capsys):
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = timm.create_model("resnet18", num_classes=3, **{**SIZES, "channels": [4, 4, 6, 8]})
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(net.state_dict(), paths[-1])
    base, *models = map(str, paths)
    command = [
        "merge",
        "--base",
        base,
        "--models",
        *models,
        "--merger",
        "MagMax",
        "--buffers=re-estimated",
        "--dry-run",
    ]
    assert main([*command, "--data", str(folder / "fit.yaml")]) == 1
    assert "name a configuration of the model that is merged" in capsys.readouterr().err


def test_statistics_of_a_run_that_were_exchanged_are_refused(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "latest", run)
    shutil.copy(run / "unmerged" / "task_000.safetensors", run / "unmerged" / "task_001.safetensors")
    assert merge(runs, [run], "--buffers=latest", "--dry-run") == 1
    assert "unmerged/task_001.safetensors as the run has committed it" in capsys.readouterr().err
