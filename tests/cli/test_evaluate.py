import json
import math
from dataclasses import replace

import pytest
import torch
from support.small_runs import learned_run, text_run

from clmerge.cli import main
from clmerge.report import read_study
from clmerge.results.model_facts import ModelFacts
from clmerge.results.results import Results, validate
from clmerge.weights import load_metadata, load_tensors, save_tensors

OTHER = ["--stream", "ClassIncremental", "--stream.source", "SklearnDigits", "--stream.source.test_fraction", "0.1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make.__name__: make(tmp_path_factory.mktemp(make.__name__)) for make in (text_run, learned_run)}


def evaluated(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    validate(document)
    return Results.from_dict(document["runs"][0])


def recorded(run):
    return Results.from_dict(json.loads((run / "results.json").read_text())["runs"][0])


@pytest.mark.parametrize("which", ["text_run", "learned_run"])
def test_the_own_stream_gives_the_accuracies_of_the_run(folders, which, capsys):
    found, known = evaluated(capsys, folders[which]), recorded(folders[which])
    assert found.models == known.models
    assert (found.tasks, found.samples, found.evaluation) == (known.tasks, known.samples, known.evaluation)
    for model in known.models:
        for setting in ("task_agnostic", "task_aware"):
            rows = found.matrix(model, setting).tolist()
            assert len(rows) == len(known.tasks)
            finished = rows if model == "zero_shot" else rows[-1:]  # of the tasks before, nobody knows
            assert all(math.isnan(value) for row in rows[: len(rows) - len(finished)] for value in row)
            for row in finished:
                for a, b in zip(row, known.matrix(model, setting)[-1].tolist(), strict=True):
                    assert a == b or (math.isnan(a) and math.isnan(b))
        assert found.model(model).kind == known.model(model).kind
        for setting in ("task_agnostic", "task_aware"):
            answers = found.confusion(model, setting)
            assert answers == known.confusion(model, setting), "fit counts answers by class after the last task"
            assert (answers is None) == (found.model(model).needs_task and setting == "task_agnostic")
            if answers is not None:  # accuracies by class make the accuracies by task
                assert answers.wrong or setting == "task_aware"
                places, matrix = found.class_names, found.matrix(model, setting)[-1]
                for names, samples, accuracy in zip(found.classes, found.samples, matrix, strict=True):
                    own = [places.index(name) for name in names]
                    assert sum(answers.images[i] for i in own) == samples
                    assert sum(answers.right[i] for i in own) / samples == pytest.approx(accuracy)


def test_another_order_of_the_same_classes(folders, capsys):
    """The same images under other class ids: a text head is made anew, a learned head finds its classes by name."""
    for which in ("text_run", "learned_run"):
        known = recorded(folders[which])
        one = evaluated(capsys, folders[which], "--models", "MagMax", *OTHER, "--stream.num_tasks", "1")
        assert one.models == ["magmax"]
        right = sum(a * n for a, n in zip(known.matrix("magmax")[-1], known.samples, strict=True))
        assert one.matrix("magmax")[0][0] * one.samples[0] == pytest.approx(right)


def test_a_view_per_task_serves_streams_of_its_tasks_alone(folders, capsys):
    run = folders["text_run"]
    arguments = ["evaluate", str(run), "--models", "EMR", *OTHER]
    assert main([*arguments, "--stream.num_tasks", "1"]) == 1
    assert "for emr, which needs to be told the task" in capsys.readouterr().err
    names = [str(name) for name in recorded(run).classes[1]]
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    own = [words.index(name) for name in names]
    order = [*own, *(index for index in range(10) if index not in own)]  # the two tasks swapped
    found = evaluated(capsys, *arguments[1:], "--stream.num_tasks", "2", f"--stream.class_order={order}")
    expected = recorded(run).matrix("emr", "task_aware")[-1].tolist()
    assert found.matrix("emr", "task_aware")[-1].tolist() == pytest.approx(expected[::-1])


def test_classes_that_were_never_seen(folders, tmp_path, capsys):
    from streams.tiny_layouts import write_tree

    write_tree(tmp_path / "photos", ["ant", "bee"], 6)
    photos = ["--stream", "ClassIncremental", "--stream.source", "ImageFolderSource", "--stream.num_tasks", "1"]
    photos += ["--stream.source.root", str(tmp_path / "photos")]
    out = tmp_path / "out"
    assert main(["evaluate", str(folders["text_run"]), *photos, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Accuracy in % on test images" in text
    assert "zero_shot" in text
    assert "emr" not in text  # it needs a task of its own
    study = read_study([str(out)])
    assert study.runs[0].results.classes == [["ant", "bee"]]
    assert main(["evaluate", str(folders["learned_run"]), *photos]) == 1
    error = capsys.readouterr().err
    assert "got 'ant' and 1 more: only a text head" in error
    assert "Traceback" not in error


def test_validation_images(folders, capsys):
    found = evaluated(capsys, folders["text_run"], "--models", "zero_shot", "magmax", "--split", "val")
    assert sum(found.samples) > sum(recorded(folders["text_run"]).samples)
    assert (found.split, found.to_dict()["split"]) == ("val", "val")
    assert math.isnan(found.figures("magmax", "task_agnostic")["forgetting"])
    assert main(["evaluate", str(folders["text_run"]), "--split", "val", *OTHER, "--stream.val_fraction", "0"]) == 1
    assert "expected validation images for --split val" in capsys.readouterr().err


def test_all_images_of_a_folder_on_which_nothing_was_trained(folders, tmp_path, capsys):
    from streams.tiny_layouts import write_tree

    write_tree(tmp_path / "photos", ["ant", "bee", "cat"], 6)
    photos = ["--stream", "ClassIncremental", "--stream.source", "ImageFolderSource", "--stream.num_tasks", "1"]
    photos += ["--stream.source.root", str(tmp_path / "photos"), "--models", "magmax"]
    assert sum(evaluated(capsys, folders["text_run"], *photos).samples) < 18
    found = evaluated(capsys, folders["text_run"], *photos, "--split", "all")
    assert found.samples == [18]
    assert found.confusion("magmax").images == [6, 6, 6]
    assert found.matrix("magmax")[0][0] == sum(found.confusion("magmax").right) / 18
    assert main(["evaluate", str(folders["text_run"]), *photos, "--split", "all"]) == 0
    assert "Accuracy in % on all images, task-agnostic, 18 images" in capsys.readouterr().out


STREAM = [*OTHER, "--stream.num_tasks", "2", "--stream.class_order", "random"]


@pytest.mark.parametrize("backbone", [["--backbone", "OpenClip"], []])
def test_a_checkpoint(folders, capsys, backbone):
    """A file of a run names its backbone in its header."""
    run = folders["text_run"]
    file = run / "model" / "magmax.safetensors"
    found = evaluated(capsys, file, *backbone, *STREAM)
    assert found.models == ["magmax"]
    assert found.matrix("magmax")[-1].tolist() == pytest.approx(recorded(run).matrix("magmax")[-1].tolist())
    assert found.confusion("magmax") == recorded(run).confusion("magmax")


def test_a_checkpoint_says_what_it_looked_at(folders, capsys, tmp_path):
    own = folders["text_run"] / "model" / "magmax.safetensors"
    facts = ModelFacts.from_metadata(load_metadata(own), str(own))
    file = tmp_path / "learned.safetensors"
    save_tensors(file, load_tensors(own), metadata=replace(facts, data="val(unlabelled)").to_metadata())
    assert main(["evaluate", str(file), *STREAM]) == 0
    heading, row = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert (heading[-1], row[0], row[-1]) == ("data", "learned", "val(unlabelled)")


def header(**changes):
    facts = {"class": "OpenClip", "settings": {"name": "nano"}}
    return ModelFacts("m", "r", {**facts, **changes.pop("backbone", {})}, "ZeroShotHead", "Full()", None, "", ["a"], [])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (None, "whose header (clmerge.model) names its backbone, got"),
        (header(backbone={"class": "os.system"}), "expected a backbone of clmerge with its settings"),
        (header(backbone={"settings": None}), "got 'OpenClip' without settings: name the architecture with --backbone"),
    ],
)
def test_a_file_that_names_no_backbone_needs_the_option(facts, message, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    save_tensors(file, {"w": torch.zeros(2)}, metadata={} if facts is None else facts.to_metadata())
    assert main(["evaluate", str(file), *STREAM]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_whose_learned_head_is_elsewhere_is_not_evaluated_with_another(folders, capsys):
    assert main(["evaluate", str(folders["learned_run"] / "model" / "magmax.safetensors"), *STREAM]) == 1
    assert "whose 'LinearHead' is a file of its own: evaluate the run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "expected a run folder or a checkpoint, got nowhere"),
        (["{run}", "--models", "tise"], 1, "expected one of the models magmax, emr"),
        (["{run}", "--backbone", "OpenClip"], 2, "expected --backbone with a checkpoint alone"),
        (["{run}/config.yaml"], 2, "expected --stream with"),
        (["{run}", "--spilt", "val"], 2, "did you mean --split?"),
        (["{run}", "--split", "tset"], 2, "did you mean 'test'?"),
        (["{run}/model", "--models", "magmax"], 1, "expected a run folder with a manifest.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, code, message, folders, capsys):
    words = [word.format(run=folders["text_run"]) for word in arguments]
    try:
        found = main(["evaluate", *words])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert (found, "Traceback" in error) == (code, False)
    assert message in error
