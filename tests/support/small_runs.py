"""Finished runs of the embedded model on two tasks of digits, made once per process by ``clmerge fit``."""

import pytest

from clmerge.cli import main

_TEXT = "mergers: [MagMax, EMR]\nmodel: {backbone: OpenClip, loss_classes: all, optimizer: {class_path: AdamW}}\n"
_LEARNED = "mergers: [MagMax]\nmodel: {backbone: OpenClip, head: LinearHead, tuning: LoRA}\n"
_REST = """
name: {name}
stream: {{class_path: ClassIncremental, init_args: {{num_tasks: 2, class_order: random, val_fraction: 0.2,
  source: {{class_path: SklearnDigits, init_args: {{test_fraction: 0.1}}}}}}}}
learner: {{calibrations: [{calibration}], keep_task_vectors: {keep}}}
data: {{batch_size: 64}}
trainer: {{max_epochs: 1, accelerator: cpu, limit_train_batches: 4, limit_val_batches: 1, enable_progress_bar: false}}
logging: {{wandb: false, csv: false}}
"""


def _make(folder, model, **settings):
    config, run = folder / "config.yaml", folder / "run"
    config.write_text(model + _REST.format(**settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return run


def text_run(folder):
    """MagMax, EMR (a view per task) and tuned models, with a text head."""
    return _make(folder, _TEXT, name="text", calibration="SampleTuning", keep="true")


def learned_run(folder):
    """MagMax and a model with an aligned head, tuned by LoRA, with a learned head, without task vectors."""
    return _make(folder, _LEARNED, name="learned", calibration="HeadAlignment", keep="false")
