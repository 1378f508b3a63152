"""The code of docs/other_callbacks.md and docs/trajectories.md runs, block after block."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from support.foreign import BackboneModule
from support.tiny import toy_loader

from clmerge.callbacks import MergeCallback
from clmerge.merging import TIES, MagMax, WeightAverage
from clmerge.weights import save_tensors

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "other_callbacks.md").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_blocks_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {
        "quiet": {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "LitModel": BackboneModule,
        "model": BackboneModule(),
        "loaders": [toy_loader(task) for task in range(3)],
        "val_loader": toy_loader(8),
        "test_loader": toy_loader(9),
    }
    for tool in (
        BackboneFinetuning,
        EarlyStopping,
        EMAWeightAveraging,
        MagMax,
        MergeCallback,
        ModelCheckpoint,
        TIES,
        Trainer,
        WeightAverage,
        save_tensors,
    ):
        names[tool.__name__] = tool
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    for block in blocks:
        if "get_peft_model" in block:
            try:
                import peft
            except ModuleNotFoundError:
                continue
            names |= {"get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
        line = TEXT[: TEXT.index(block)].count("\n")
        exec(compile("\n" * line + block, str(DOCS / "other_callbacks.md"), "exec"), names)
    assert (tmp_path / "out" / "merged.safetensors").is_file()


def test_the_page_on_averages_runs():
    text = (DOCS / "trajectories.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    names = {"MergeCallback": MergeCallback, "MagMax": MagMax, "Trainer": Trainer}
    names |= {"quiet": quiet | {"enable_checkpointing": False}, "model": BackboneModule()}
    names["loaders"] = [toy_loader(task) for task in range(2)]
    exec(compile(block, "trajectories.md", "exec"), names)
    assert names["merge"].num_tasks == 2
    assert names["average"].rule.count == 6


@pytest.mark.parametrize("name", ["lifecycle.md", "other_callbacks.md"])
def test_the_readme_links_both_pages(name):
    assert f"(docs/{name})" in (DOCS.parent / "README.md").read_text()
