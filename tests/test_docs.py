"""The commands and the code of README, CONTRIBUTING and docs run as they are written, on small stand-ins and offline.

Only what takes data, minutes or a server is left out, by name and with the reason.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from streams.tiny_layouts import hugging_face_split, samples, write_members, write_tree
from support.keys import write_keys
from support.tiny import ForeignModule, toy_loader

from clmerge.cli import main
from clmerge.weights import load_tensors, save_tensors

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
PROGRAMS = re.compile(r"(clmerge \w+|python|pip|wandb|pytest|scripts/\w+|\.venv/\S+)(\s|$)")
BASE = ROOT / "clmerge" / "models" / "nano_clip" / "open_clip_model.safetensors"
NOT_RUN = {
    "clmerge compare runs/backdoor-0 runs/backdoor-1": "merges by 34 rules; takes minutes",
    "clmerge fit --config stranger.yaml": "is refused; tests/cli/test_named_code.py says how",
    "clmerge fit --config configs/quickstart.yaml --learner.start_policy=base --run_dir shared/ray": "starts Ray; "
    "tests/cli/test_launch.py has one",
    "scripts/quickstart": "installs gigabytes; the fit that it runs is the README's",
    "scripts/test": "is what runs this",
    "scripts/docs": "is what .ci/run runs beside this",
    "python examples/find_learning_rate.py": "tests/test_examples.py runs it",
    "python scripts/methods_data.py": "needs the data sets",
    "python scripts/bench_adaptive.py": "takes minutes; tests/test_bench_adaptive.py runs it on small shapes",
    "python scripts/science/run.py": "takes hours",
    "python scripts/science/pages.py": "writes these pages; tests/test_science.py compares",
    "python scripts/bench_routing.py": "takes minutes",
    "python scripts/trust_table.py": "takes half an hour",
    "pip install wandb-workspaces": "needs a network",
    "python scripts/wandb_report.py": "needs W&B's server",
    "python scripts/convert_results.py": "needs files of schema 1; tests/test_convert_results.py runs it",
    "clmerge push runs/digits --model TIES --repo USER/NAME": "needs the hub; tests/cli/test_push.py has one",
    "wandb sweep": "needs W&B's server",
    "clmerge fit --config configs/quickstart.yaml --logging.extra='[{class_path: MLFlow": "needs MLflow's server, "
    "which tests/loggers/test_mlflow.py has",
    "wandb agent": "needs W&B's server",
}
SPLITS = ("train", "val", "test")
ALWAYS = ("README.md", "merge.md", "mergers.md")  # the others take minutes together: scripts/test --all
SHORT = [
    "--stream.source.test_fraction=0.05",
    "--stream.num_tasks=2",
    "--stream.val_fraction=0.2",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.enable_progress_bar=false",
    "--logging.wandb=false",
]
MODELS = ["--base", "base.safetensors", "--models", "a.pt", "b.pt", "c.pt"]


def commands_of(page):
    """Commands in indented blocks, and the calls for help within sentences."""
    text = PAGES[page].read_text(encoding="utf-8")
    lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.startswith("    ")]
    found = [line for line in lines if PROGRAMS.match(line)]
    return found + [" ".join(call.split()) for call in re.findall(r"`(clmerge \w+ [^`]*help[^`]*)`", text)]


def blocks_of(page, language):
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the quickstart's configuration on two small tasks, with a comparison."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    config = ["--config", str(ROOT / "configs" / "quickstart.yaml"), *SHORT]
    assert main(["fit", *config, "--run_dir", str(folder)]) == 0
    assert main(["compare", str(folder), "--mergers", "MagMax", "--scale", "0.5,1.0"]) == 0
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, request):
    """A folder with what the docs name: configs, runs, a base and three models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "clmerge").symlink_to(ROOT / "clmerge")
    base = load_tensors(BASE)
    save_tensors("base.safetensors", base)
    for index, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(index)
        model = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        torch.save(model, f"{name}.pt")
        save_tensors(f"{name}.safetensors", model)
    for seed, folder in enumerate(("adapter_a", "adapter_b")):
        write_adapter(Path(folder), base, seed)
    (recipe,) = re.findall(
        r"(?:^    .*\n)+", PAGES["merge.md"].read_text(encoding="utf-8").split("## Recipes")[1], re.M
    )[:1]
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    write_tree(tmp_path / "photos", ["ant", "bee", "cat", "dog"], 10)
    table = ["path,label,split,domain"]
    for number, path in enumerate(sorted(Path("photos").glob("*/*"))):
        table.append(
            f"{path},{path.parent.name},{['train', 'val', 'test'][number % 3]},{['home', 'street'][number % 2]}"
        )
    Path("labels.csv").write_text("\n".join(table), encoding="utf-8")
    Path("own.yaml").write_text(blocks_of("images.md", "yaml")[0], encoding="utf-8")

    def runs(page):
        if page == "sources.md":
            hugging_face_split(40, names=["ant", "bee", "cat", "dog"]).save_to_disk("pets")
            for first, name in enumerate(("train-000", "train-001", "test-000")):
                write_members(Path("shards") / f"{name}.tar", samples(20 * first, 20, num_classes=4))
        if page == "provenance.md":
            write_keys(tmp_path)
        code = "\n".join([*commands_of(page), *blocks_of(page, "python")])
        made = re.findall(r"--run_dir runs/([\w-]+)", code)
        for name in sorted(set(re.findall(r"\bruns/([\w-]+)", code)) - {*made}):
            shutil.copytree(request.getfixturevalue("finished"), tmp_path / "runs" / name)
        if "runs/all-classes" in code:
            shutil.rmtree("runs/all-classes")
            joint = [option.replace("num_tasks=2", "num_tasks=1") for option in SHORT]
            run([*shlex.split("clmerge fit --config configs/quickstart.yaml --run_dir runs/all-classes"), *joint])

    return runs


def write_adapter(folder, base, seed):
    """Write a LoRA adapter of rank 4 for the MLPs of a base, as PEFT does."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in (name for name in base if name.endswith(("c_fc.weight", "c_proj.weight"))):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, base[name].shape[1], generator=generator)
        tensors[f"{stem}.lora_B.weight"] = 0.01 * torch.randn(len(base[name]), 4, generator=generator)
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def run(words):
    """Run a command in this process."""
    try:
        code = main(words[1:])
    except SystemExit as stop:
        code = stop.code
    assert not code, " ".join(words)


def completed(line):
    """Return the words of a command with its ``...`` filled in, shortened, and nothing in the way of its output."""
    words = shlex.split(line, comments=True)
    if "..." in words:
        words[words.index("...") : words.index("...") + 1] = MODELS
        words += [] if "--merger" in words else ["--merger", "TIES"]
        words += [] if "--out" in words else ["--out", "other.safetensors"]
    if words[1] in ("fit", "sweep") and "--config" in words:
        named = any("configs/scenarios/" in word for word in words)  # scenarios name tasks of the quickstart's five
        words += [option for option in SHORT if not (named and "num_tasks" in option)]
    if "--out" in words or "--recipe" in words:
        out = Path(words[words.index("--out") + 1] if "--out" in words else "merged.safetensors")
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    return words


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page if page in ALWAYS else pytest.param(page, marks=pytest.mark.exhaustive) for page in PAGES]
)
def test_commands_run(page, place, capsys):
    lines = [line for line in commands_of(page) if not line.startswith(tuple(NOT_RUN))]
    if lines:
        place(page)
    for line in lines:
        assert line.startswith("clmerge "), f"{page}: {line!r} is neither run nor in NOT_RUN"
        run(completed(line))


def test_what_is_not_run_is_still_there():
    lines = [line for page in PAGES for line in commands_of(page)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []


@pytest.mark.parametrize("page", PAGES)
def test_configurations_are_read(page, tmp_path, capsys):
    for index, block in enumerate(blocks_of(page, "yaml")):
        file = tmp_path / f"{index}.yaml"
        file.write_text(block, encoding="utf-8")
        run(["clmerge", "fit", "--config", str(file), "--print_config"])


def in_a_project():
    from lightning.pytorch import Trainer as LightningTrainer

    def trainer(**options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return LightningTrainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet, **options)

    test = SimpleNamespace(test=lambda model: trainer().test(model, toy_loader(0), verbose=False))
    tasks = [toy_loader(task) for task in range(2)]
    return {"tasks": tasks, "model": ForeignModule(), "Trainer": trainer, "trainer": test}


def on_its_own():
    from clmerge.merging import MagMax
    from clmerge.weights import apply_task_vector, task_vector

    theta = {"w": torch.ones(3)}
    checkpoints = [{"w": torch.full((3,), value)} for value in (1.5, 0.25)]
    names = {"MagMax": MagMax, "apply_task_vector": apply_task_vector, "task_vector": task_vector}
    return {**names, "theta0": theta, "checkpoints": checkpoints}


def in_a_run():
    from clmerge.cli.open_run import open_run

    run, _ = open_run("runs/NAME", name="NAME")
    return {"module": run.module, "base": run.base, "data": run.data, "merged": run.bank[0]}


def on_images():
    return {}


def in_a_module():
    import timm
    from lightning.pytorch import LightningModule

    return {"timm": timm, "LightningModule": LightningModule}


# What the names of a block stand for, and what is looked at afterwards.
PYTHON = {
    ("README.md", 0): (in_a_project, lambda found: found["merge"].num_tasks == 2),
    ("README.md", 1): (on_its_own, lambda found: found["merged"]["w"].tolist() == [0.625] * 3),
    ("cluster.md", 0): (on_its_own, lambda found: found["merged"]["w"].shape == (3,)),
    ("diagnostics.md", 0): (in_a_run, lambda found: found["found"]["vectors"]["whole"]["cosine"][0][0] is not None),
    ("evaluate.md", 0): (on_images, lambda found: found["found"].shape == (2, 96)),
    ("linearized.md", 0): (in_a_module, lambda found: found["MyModule"]()),
    ("mergers.md", 0): (dict, lambda found: found["here"].tasks == (0,)),
    ("probes.md", 0): (
        dict,
        lambda found: (
            found["Distance"]().measure({"w": torch.full((2, 2), 2.0)}, {"w": torch.zeros(2, 2)}, None).value == 4
        ),
    ),
    ("removing.md", 0): (in_a_project, lambda found: found["merge"].mergers["magmax"].tasks == (1,)),
    ("results.md", 0): (in_a_run, lambda found: found["results"].num_finished == 2),
    ("search.md", 0): (dict, lambda found: abs(found["best"]["scale"] - 0.5) < 0.1 and len(found["tried"]) == 40),
    ("sources.md", 0): (dict, lambda found: [len(found["stream"].dataset(3, s)) for s in SPLITS] == [16, 4, 20]),
    ("tuning.md", 0): (in_a_module, lambda found: found["MyModule"]()),
}
# The first defines a merger, which would be one in all tests that follow: it has a process of its own.
ELSEWHERE = {
    "adaptive.md": "tests/merging/learned/test_docs.py",
    "CONTRIBUTING.md": "below",
    "other_callbacks.md": "tests/callbacks/test_docs.py",
    "own_rule.md": "tests/merging/test_bases.py",
    "routing.md": "tests/deploy/routing/test_docs.py",
    "trajectories.md": "tests/callbacks/test_docs.py",
}


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block[0]}-{block[1]}")
def test_python_runs(block, request, monkeypatch, tmp_path):
    page, index = block
    monkeypatch.chdir(tmp_path)
    prepare, holds = PYTHON[block]
    if prepare in (in_a_run, on_images):
        request.getfixturevalue("place")(page)
    namespace = prepare()
    code = blocks_of(page, "python")[index].replace(", ...)", ")")  # the reader's own arguments
    exec(compile(code, f"{page}, block {index}", "exec"), namespace)
    assert holds(namespace)


@pytest.mark.slow
def test_a_merger_of_the_readers_own_runs():
    code = f"import sys, torch\nsys.path.append({str(ROOT / 'tests')!r})\nfrom clmerge.merging import Merger\n"
    code += "\n".join(blocks_of("CONTRIBUTING.md", "python"))
    code += (
        "\nvectors = [{'w': np.array([2.0, -3.0])}, {'w': np.array([4.0, 1.0])}]"
        "\nfor case in CASES.values():"
        "\n    merger = case.build()"
        "\n    [merger.update({'w': torch.from_numpy(vector['w'])}) for vector in vectors]"
        "\n    print(merger.compute()['w'].tolist(), case.batch(vectors, [0, 1])['w'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[2.0, 0.0] [2.0, 0.0]\n[1.0, 0.0] [1.0, 0.0]\n"


def test_every_block_of_python_is_run():
    pages = PAGES.keys() - ELSEWHERE.keys()
    assert {(page, index) for page in pages for index, _ in enumerate(blocks_of(page, "python"))} == set(PYTHON)
