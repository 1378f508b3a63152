"""Every shipped config is parsed, built and run on stand-ins: a tiny CLIP, and data in the real layout."""

from pathlib import Path

import pytest
import yaml
from streams import tiny_layouts as layouts
from support.records import record
from support.tiny import tiny_clip

from clmerge.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
RENDITIONS = (
    "art cartoon deviantart embroidery graffiti graphic misc origami painting sculpture sketch sticker tattoo toy "
    "videogame"
)
DOMAINS = ["clipart", "sketch", "real", "infograph", "quickdraw", "painting"]


def synsets(num):
    return [f"n{i:08d}" for i in range(num)]


def write_imagenet_r(root, prefixes, num_classes, per_class):
    for prefix in prefixes:
        layouts.write_tree(root / "imagenet-r", synsets(num_classes), per_class, prefix=prefix)
    lines = [f"{name} thing {i}" for i, name in enumerate(synsets(num_classes))]
    (root / "imagenet-r" / "README.txt").write_text("\n".join(lines))


def write_cub(root):
    names = [f"{i + 1:03d}.Bird_{i}" for i in range(200)]
    for split, count in (("train", 2), ("test", 1)):
        layouts.write_tree(root / "cub200" / split, names, count)


def write_eight(root):
    layouts.write_cars(root)
    layouts.write_mnist(root)
    layouts.write_eurosat(root, per_class=10)
    layouts.write_svhn(root)
    layouts.write_tree(root / "resisc45", ["airplane", "beach"], 5)
    layouts.write_sun397(root)
    layouts.write_dtd(root)
    layouts.write_gtsrb(root)


STAND_INS = {
    "magmax_cifar100": (layouts.write_cifar100, 10),
    "magmax_imagenet_r": (lambda root: write_imagenet_r(root, ["art"], 200, 5), 10),
    "magmax_cub200": (write_cub, 10),
    "magmax_cars": (layouts.write_cars, 2),
    "magmax_domainnet": (lambda root: layouts.write_domain_lists(root / "domainnet", DOMAINS), 6),
    "magmax_imagenet_r_domains": (lambda root: write_imagenet_r(root, RENDITIONS.split(), 2, 20), 15),
    "magmax_eight_datasets": (write_eight, 8),
    "quickstart": (lambda root: None, 5),
    "early_stopping": (lambda root: None, 5),
}


def test_every_config_has_its_stand_in():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(STAND_INS)


@pytest.mark.parametrize("name", list(STAND_INS))
def test_config_runs_on_stand_in_data(name, tmp_path, monkeypatch, capsys):
    write, num_tasks = STAND_INS[name]
    layouts.accept_any_checksum(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLMERGE_RUN_DIR", raising=False)
    write(tmp_path / "data")
    arguments = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--run_dir", "run"]
    arguments += [f"--model.backbone.name={tiny_clip(tmp_path / 'clip')}"]
    arguments += ["--data.num_workers=0", "--logging.wandb=false"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=1", "--trainer.log_every_n_steps=1"]
    if name not in ("quickstart", "early_stopping"):
        arguments += ["--model.backbone.pretrained=null", "--model.warmup_steps=0"]
    if name == "magmax_cars":  # the stand-in has two classes
        arguments.append("--stream.num_tasks=2")
    if name == "magmax_eight_datasets":
        arguments.append("--learner.epochs=[1,1,1,1,1,1,1,1]")
    arguments += ["--trainer.max_epochs=1", "--learner.keep_task_vectors=false"]
    monkeypatch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])  # drawn elsewhere; seconds each
    assert main(arguments) == 0
    results = record(tmp_path / "run")
    assert len(results["tasks"]) == num_tasks
    mergers = [name for name in results["models"] if name not in ("expert", "zero_shot")]
    assert len(mergers) == len(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["mergers"])


def test_published_constants():
    """The numbers of the protocol, as a reader of the paper would look for them."""
    for path in CONFIGS.glob("magmax_*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert config["model"]["backbone"]["init_args"] == {"name": "ViT-B-16-quickgelu", "pretrained": "openai"}
        assert float(config["model"]["optimizer"]["init_args"]["lr"]) == 1e-5
        assert config["model"]["optimizer"]["init_args"]["weight_decay"] == 0.1
        assert (config["model"]["warmup_steps"], config["data"]["batch_size"], config["seed"]) == (500, 128, 5)
        assert config["trainer"]["gradient_clip_val"] == 1.0
        assert config["learner"]["start_policy"] == "previous"
        epochs = 30 if path.stem in ("magmax_cub200", "magmax_cars") else 10
        assert config["trainer"]["max_epochs"] == epochs
