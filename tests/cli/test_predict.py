import csv
import json
import shutil

import pytest
import torch
from support.small_runs import learned_run, text_run

from clmerge.cli import main
from clmerge.cli.open_run import open_run
from clmerge.streams import SklearnDigits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make.__name__: make(tmp_path_factory.mktemp(make.__name__)) for make in (text_run, learned_run)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    source = SklearnDigits()
    for index in range(6):
        source.test().image(index).save(folder / f"{index}.png")
    return folder


def predicted(capsys, *arguments, code=0):
    assert main(["predict", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("which", "model"),
    [
        ("text_run", "magmax"),
        ("text_run", "magmax+tuned"),
        ("text_run", "zero_shot"),
        ("learned_run", "expert"),
        ("learned_run", "magmax+aligned"),
    ],
)
def test_the_probabilities_are_those_of_the_evaluated_model(folders, images, which, model, capsys):
    found = predicted(capsys, folders[which], images, "--model", model, "--top", 10)
    run, _ = open_run(str(folders[which]), name="run", merges_again=False)
    predictor = run.predictor(model)
    predictor.prepare(lambda make: make())
    module, source = run.module.eval(), SklearnDigits()
    batch = torch.stack([module.backbone.eval_transform(source.test().image(index)) for index in range(6)])
    with torch.no_grad():
        scores = predictor.scores(
            lambda state: torch.func.functional_call(module, dict(state), (batch,)), torch.zeros(6, dtype=torch.long)
        )
    assert [each["image"] for each in found["images"]] == [str(images / f"{index}.png") for index in range(6)]
    for each, row in zip(found["images"], scores.softmax(dim=1), strict=True):
        values = {one["class"]: one["probability"] for one in each["classes"]}
        assert list(values.values()) == sorted(values.values(), reverse=True)
        assert len(values) == 10
        for name, value in zip(run.stream.class_names, row.tolist(), strict=True):
            assert values[name] == pytest.approx(value, abs=1e-5)


def test_neither_stream_nor_bank_is_needed(folders, images, monkeypatch, capsys):
    def gone(self, split):
        raise AssertionError("the data are gone")

    monkeypatch.setattr(SklearnDigits, "_load", gone)
    assert len(predicted(capsys, folders["text_run"], images)["images"]) == 6
    assert len(predicted(capsys, folders["learned_run"], images)["images"]) == 6


def test_a_run_of_an_older_version_reads_the_classes_from_its_stream(folders, images, tmp_path, capsys):
    shutil.copytree(folders["text_run"], tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "model")
    own = predicted(capsys, folders["text_run"], images, "--model", "expert")
    assert predicted(capsys, tmp_path / "old", images, "--model", "expert") == own


def test_a_task_restricts_the_classes_and_chooses_the_view(folders, images, capsys):
    run = folders["text_run"]
    assert main(["predict", str(run), str(images), "--model", "EMR"]) == 1
    assert "expected --task for emr" in capsys.readouterr().err
    known = json.loads((run / "results.json").read_text())["runs"][0]
    for task, names in enumerate(known["classes"]):
        found = predicted(capsys, run, images, "--model", "EMR", "--task", task + 1, "--top", 10)
        for each in found["images"]:
            assert {one["class"] for one in each["classes"]} == set(names)
            assert sum(one["probability"] for one in each["classes"]) == pytest.approx(1)
        assert predicted(capsys, run, images, "--model", "emr", "--task", known["tasks"][task], "--top", 10) == found


def test_classes(folders, images, capsys):
    some = predicted(capsys, folders["learned_run"], images, "--classes", "Seven", "one")
    assert all({one["class"] for one in each["classes"]} == {"Seven", "one"} for each in some["images"])
    new = predicted(capsys, folders["text_run"], images, "--classes", "cat", "one")
    assert all({one["class"] for one in each["classes"]} == {"cat", "one"} for each in new["images"])
    assert main(["predict", str(folders["text_run"]), str(images), "--classes", "cat", "one"]) == 0
    err = capsys.readouterr().err
    assert "cat: not a class of" in err
    assert "one: not a class" not in err
    assert main(["predict", str(folders["learned_run"]), str(images), "--classes", "cat", "one"]) == 1
    assert "got 'cat': only a text head" in capsys.readouterr().err


def test_what_cannot_be_read_does_not_stop_the_others(folders, images, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = [images / "0.png", tmp_path / "bad.png", tmp_path / "none.png", images / "1.png"]
    table = tmp_path / "found.csv"
    found = predicted(capsys, folders["text_run"], *words, "--top", 2, "--csv", table, code=1)
    assert ["error" in each for each in found["images"]] == [False, True, True, False]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["image"], row["rank"]) for row in rows] == [
        (str(images / f"{index}.png"), rank) for index in (0, 1) for rank in ("1", "2")
    ]
    assert [row["class"] for row in rows[:2]] == [one["class"] for one in found["images"][0]["classes"]]
    assert main(["predict", str(folders["text_run"]), *map(str, words)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "bad.png" in err
    assert "none.png, got no such file" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "x.png"], 1, "expected a run folder with a manifest.json, got nowhere"),
        (["{run}"], 2, "expected IMAGE after clmerge predict, got none"),
        (["{run}", "x.png", "--top", "0"], 2, "expected --top of 1 or more, got 0"),
        (["{run}", "x.png", "--modle", "a"], 2, "did you mean --model?"),
        (["{run}", "x.png", "--model", "a"], 1, "expected one of the models magmax, emr"),
        (["{run}", "x.png", "--model", "magmx"], 1, "got 'magmx'; did you mean 'magmax'?"),
        (["{run}", "x.png", "--task", "9"], 1, "expected the name or number of one of the tasks"),
        (["{run}", "{run}/state"], 1, "expected images in"),
        (["{run}", "x.png", "--classes", "a", "a"], 2, "expected different --classes, got a twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, code, message, folders, capsys):
    words = [word.format(run=folders["text_run"]) for word in arguments]
    try:
        found = main(["predict", *words])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert (found, "Traceback" in error) == (code, False)
    assert message in error
