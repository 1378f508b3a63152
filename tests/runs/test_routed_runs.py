"""Routings in a run of fit: resumed, compared, evaluated again, exported, predicted with."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.records import record, without_times

from clmerge import ContinualClassifier, Learner, load_run
from clmerge.cli import main
from clmerge.cli.open_run import open_final_model, open_run
from clmerge.deploy.routing import NearestCentroid, Smile, TaskOracle, load_routed
from clmerge.deploy.routing.routed import Routed, RoutedByTask, RoutedViews
from clmerge.merging import EMR, TaskArithmetic
from clmerge.models import Adapters, Full, LinearHead, Linearized, LoRA, OpenClip, ZeroShotHead
from clmerge.results.run_folder import RunFolder
from clmerge.runs.exported import export
from clmerge.runs.model_card import model_card
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.weights import load_tensors

CONFIG = """
name: routed
mergers: [TaskArithmetic, EMR]
model: {backbone: {class_path: OpenClip, init_args: {name: CLIP}}, loss_classes: all, optimizer: {class_path: AdamW}}
stream: {class_path: ClassIncremental, init_args: {num_tasks: 2, source: {class_path: SklearnDigits}}}
learner: {routings: [{class_path: Smile, init_args: {rank: 4, gate_k: 2}},
  {class_path: NearestCentroid, init_args: {rank: 4}}, {class_path: TaskOracle, init_args: {rank: 4}}],
  statistics_images: 32}
data: {batch_size: 64}
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 4, enable_progress_bar: false}
logging: {wandb: false, csv: false}
"""
ROUTED = ["task_arithmetic+smile", "task_arithmetic+nearest", "task_arithmetic+oracle"]


pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    (folder / "config.yaml").write_text(CONFIG.replace("CLIP", clip))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clmerge.runs.learner.save_plots", lambda results, folder: [])
        assert main(["fit", "--config", str(folder / "config.yaml"), "--run_dir", str(folder / "run")]) == 0
        patch.delenv("CLMERGE_RUN_DIR")
    return folder / "run"


def test_the_results_say_what_a_routed_model_is(folder):
    models = record(folder)["models"]
    assert set(models) >= {*ROUTED, "emr+nearest"}
    assert "emr+smile" not in models  # which has one set of weights around its experts, and EMR none
    smile, nearest = models[ROUTED[0]], models[ROUTED[1]]
    assert (smile["kind"], smile["data"]) == ("routed", "none")
    assert (nearest["kind"], nearest["data"]) == ("routed", "current")
    assert smile["rule"]["routing"] == {
        "class_path": "Smile",
        "init_args": {"rank": 4, "targets": "mlp", "gate_k": 2, "top_k": 1},
    }
    assert models[ROUTED[2]]["task_agnostic"] is None  # the oracle must be told the task
    assert models["emr+nearest"]["task_agnostic"] is not None
    for model in (smile, nearest, models["emr+nearest"]):
        probe = model["probes"]["routing_accuracy"]
        assert len(probe["per_task"]) == len(probe["n"]) == 2
        assert all(0 <= share <= 1 for share in probe["per_task"])
    kept = record(folder)["bytes"]
    assert smile["bytes_kept"][1] - models["task_arithmetic"]["bytes_kept"][1] == kept["routing.smile"]
    assert [model for model in models if models[model]["kind"] == "routed"] == [*ROUTED, "emr+nearest"]


def test_compare_finds_the_same_rows_and_adds_references(folder, capsys):
    words = ["compare", str(folder), "--mergers", "TaskArithmetic", "EMR", "--routings"]
    words.append("[{class_path: Smile, init_args: {rank: 4, gate_k: 2}}, Retrieval]")
    assert main([word for word in words if not word.startswith("[")] + [words[-1]]) == 0
    found, expected = record(folder / "compare")["models"], record(folder)["models"]
    assert "task_arithmetic+retrieval" in found
    for name in [*ROUTED, "emr+nearest"]:
        for key in ("task_agnostic", "task_aware", "probes", "bytes_kept", "kind", "data"):
            if key.startswith("task"):
                assert (found[name][key] or {}).get("R") == (expected[name][key] or {}).get("R"), (name, key)
            else:
                assert found[name][key] == expected[name][key], (name, key)
    assert "task_arithmetic+smile: routed to the right task" in capsys.readouterr().out
    before = (folder / "compare" / "rows.json").read_text()
    assert main([word for word in words if not word.startswith("[")] + [words[-1]]) == 0
    assert (folder / "compare" / "rows.json").read_text() == before  # everything was there


def test_final_models_are_those_that_were_evaluated(folder):
    run, _ = open_run(str(folder), name="run", merges_again=False)
    kinds = {"smile": Routed, "oracle": RoutedByTask}
    predictors = {name: run.predictor(name) for name in (*ROUTED, "emr+nearest", "task_arithmetic")}
    for name, predictor in predictors.items():
        expected = RoutedViews if name.startswith("emr") else kinds.get(name.rpartition("+")[2])
        assert expected is None or type(predictor) is expected
    rows = run.evaluate_again("again", predictors, 1)
    for name in predictors:
        for setting in ("task_agnostic", "task_aware"):
            expected = run.results.matrix(name, setting)[-1].tolist()
            assert all(
                a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(rows[name][setting], expected, strict=True)
            )


def test_predict_and_evaluate_accept_a_routed_model(folder, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (8, 8), "gray").save(tmp_path / "one.png")
    words = ["predict", str(folder), str(tmp_path / "one.png"), "--json", "--model"]
    assert main([*words, ROUTED[0]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == ROUTED[0]
    assert len(found["images"][0]["classes"]) == 5
    assert main([*words, ROUTED[0], "--classes", "cat", "dog"]) == 0  # the text head of other classes
    chosen = json.loads(capsys.readouterr().out)["images"][0]["classes"]
    assert {one["class"] for one in chosen} == {"cat", "dog"}
    assert main([*words, ROUTED[2]]) == 1  # which task?
    assert main([*words, ROUTED[2], "--task", "2"]) == 0
    assert main([*words, "emr+nearest"]) == 0
    stream = ["--stream", "ClassIncremental", "--stream.source", "SklearnDigits", "--stream.num_tasks", "1"]
    assert main(["evaluate", str(folder), "--models", ROUTED[0], "emr+nearest", *stream]) == 0


def test_a_routed_model_is_exported_and_loaded_without_the_run(folder, tmp_path):
    final, results = open_final_model(str(folder), model=ROUTED[1], task=None)
    export(final, "safetensors", tmp_path / "out")
    model = load_routed(tmp_path / "out" / "model.safetensors")
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model(images), final.routed(images), atol=1e-5)
        assert torch.allclose(load_run(folder).predictor(ROUTED[1]).model(images), model(images), atol=1e-5)
    card = model_card(final, results, "safetensors")
    assert "load_routed" in card
    assert "NearestCentroid(rank=4" in card
    with pytest.raises(ValueError, match="whose weights differ from image to image"):
        export(final, "open_clip", tmp_path / "other")
    with pytest.raises(ValueError, match="whose weights differ from image to image"):
        load_run(folder).state_dict(ROUTED[1])
    for name, task in ((ROUTED[2], "1"), ("emr+nearest", None)):
        with pytest.raises(ValueError, match="experts of several tasks"):
            open_final_model(str(folder), model=name, task=task)


def test_onnx_of_a_routed_model_has_any_batch_size(folder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    final, _ = open_final_model(str(folder), model=ROUTED[0], task=None)
    export(final, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), final.routed(images), atol=1e-3)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)


def learner(clip, *routings, head=None, tuning=None, mergers=None, **options):
    torch.manual_seed(0)
    head = head or ZeroShotHead()
    module = ContinualClassifier(
        OpenClip(clip),
        head,
        tuning=tuning or Full(),
        loss_classes="all" if head.open_vocabulary else "seen",
        optimizer=adam,
    )
    stream = ClassIncremental(SklearnDigits(), num_tasks=2)
    return Learner(
        stream,
        module,
        mergers or [TaskArithmetic(), EMR()],
        StreamDataModule(64),
        routings=list(routings),
        statistics_images=16,
        **options,
    )


class DieInTheLastTask(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(pl_module._seen_classes) == 10 and batch_idx == 2:
            raise KeyboardInterrupt


def build(extra=(), **given):
    options = {"max_epochs": 1, "limit_train_batches": 3, "accelerator": "cpu"} | given
    return Trainer(**options | {"callbacks": [*given["callbacks"], *extra]})


def run(one, folder, extra=()):
    return one.fit(RunFolder.create(folder), trainer=lambda **given: build(extra, **given))


def test_a_resumed_run_has_the_same_routed_models(clip, tmp_path):
    def make():
        return learner(clip, Smile(rank=2, gate_k=1), NearestCentroid(rank=2), head=LinearHead(), tuning=LoRA(rank=2))

    run(make(), tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(make(), tmp_path / "killed", [DieInTheLastTask()])
    make().fit(RunFolder.open(tmp_path / "killed"), trainer=build)
    documents = [without_times(record(tmp_path / name)) for name in ("whole", "killed")]
    assert documents[0]["models"] == documents[1]["models"]
    assert documents[0]["bytes"] == documents[1]["bytes"]
    files = list((tmp_path / "whole" / "model").glob("*+*"))
    assert len(files) == 2
    for path in files:
        expected, found = load_tensors(path), load_tensors(tmp_path / "killed" / "model" / path.name)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    with pytest.raises(ValueError, match=r"expected routings \[\"Smile"):
        learner(clip, head=LinearHead(), tuning=LoRA(rank=2)).fit(RunFolder.open(tmp_path / "killed"), trainer=build)
    with pytest.raises(RuntimeError, match=r"expected the state of routings \['smile'\]"):
        learner(clip, Smile(rank=2, gate_k=1)).routed.load_state_dict({})


def test_other_rows_are_what_they_are_without_routings(clip, tmp_path):
    documents = []
    for name, routings in (("plain", []), ("routed", [Smile(rank=2, gate_k=1), TaskOracle(rank=2)])):
        documents.append(without_times(run(learner(clip, *routings), tmp_path / name).to_dict())["models"])
    assert all(documents[1][name] == documents[0][name] for name in documents[0])
    assert len(documents[1]) == len(documents[0]) + 2


@pytest.mark.parametrize(
    ("routings", "options", "message"),
    [
        ([Smile(), Smile(rank=16)], {}, "routings of different kinds"),
        ([Smile()], {"tuning": Linearized()}, "a backbone of ordinary layers for routings, got TangentModule"),
        ([Smile()], {"tuning": Adapters()}, "a backbone of ordinary layers for routings, got AdapterLinear"),
        ([Smile()], {"mergers": {"a": TaskArithmetic(), "a+smile": TaskArithmetic(0.5)}}, r"merger than 'a\+smile'"),
    ],
)
def test_what_cannot_be_routed_is_refused_before_anything_is_trained(clip, routings, options, message):
    with pytest.raises(ValueError, match=message):
        learner(clip, *routings, **options)
