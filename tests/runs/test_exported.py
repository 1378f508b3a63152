import hashlib
import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from support.small_runs import learned_run, text_run

from clmerge.cli import main
from clmerge.cli.open_run import open_final_model, open_run
from clmerge.models import Adapters, CosineHead, LinearHead, Linearized, OpenClip, Timm
from clmerge.results.measured import Measured
from clmerge.results.model_facts import ModelFacts
from clmerge.results.results import Results
from clmerge.runs.exported import FinalModel, export
from clmerge.runs.model_card import model_card
from clmerge.training.module import ContinualClassifier
from clmerge.weights import load_metadata, load_tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {make.__name__: make(tmp_path_factory.mktemp(make.__name__)) for make in (text_run, learned_run)}


def batch(size, seed=0):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


def scores_of(folder, name, images, task=0):
    """What the evaluated predictor says of the images."""
    run, _ = open_run(str(folder), name="run", merges_again=False)
    predictor = run.predictor(name)
    predictor.prepare(lambda make: make())
    module = run.module.eval()

    def compute(state):
        with torch.no_grad():
            return torch.func.functional_call(module, dict(state), (images,))

    return predictor.scores(compute, torch.full((len(images),), task)), module


@pytest.mark.parametrize(("name", "task"), [("magmax", None), ("magmax+tuned", None), ("zero_shot", None), ("emr", 1)])
def test_open_clip_loads_the_folder(folders, tmp_path, name, task):
    run, out, images = folders["text_run"], tmp_path / "out", batch(28)
    words = ["--model", name, *(["--task", str(task + 1)] if task is not None else [])]
    assert main(["export", str(run), "--to", "open_clip", "--out", str(out), *words]) == 0
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    expected, module = scores_of(run, name, images, task or 0)
    with torch.no_grad():
        features = model.eval().encode_image(images)
    assert torch.allclose(module.head(features), expected, atol=1e-4)
    assert str(transform) == str(module.backbone.eval_transform)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}", bpe_path=str(out / "bpe_simple_vocab.txt.gz"))
    assert torch.equal(tokenizer(["a photo of a cat."]), module.backbone._tokenize(["a photo of a cat."]))
    plain = OpenClip("nano").model  # the file alone, in a model that is there
    open_clip.load_checkpoint(plain, str(out / "open_clip_model.safetensors"))
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_a_learned_head_lies_beside_the_weights(folders, tmp_path):
    run, out, images = folders["learned_run"], tmp_path / "out", batch(28)
    words = ["--to", "safetensors", "--model", "magmax+aligned"]
    assert main(["export", str(run), *words, "--out", str(out)]) == 0
    backbone = OpenClip("nano")
    backbone.model.load_state_dict(load_tensors(out / "model.safetensors"))  # the products of LoRA's factors are in it
    expected, module = scores_of(run, "magmax+aligned", images)
    head = module.head
    head.load_state_dict(load_tensors(out / "head.safetensors"))
    with torch.no_grad():
        assert torch.allclose(head(backbone.eval()(images)), expected, atol=1e-4)
    for file in ("model.safetensors", "head.safetensors"):
        facts = ModelFacts.from_metadata(load_metadata(out / file), file)
        assert (facts.model, facts.calibration, facts.head) == ("magmax+aligned", "aligned", "LinearHead")
    kept = json.loads((out / "clmerge.json").read_text())
    assert kept["classes"] == facts.classes
    assert kept["chosen_from"] == list(range(10))


def grown(backbone, head, classes=4):
    module = ContinualClassifier(backbone, head)
    module.begin_stream(classes)
    for task in ([0, 2], [1, 3]):  # the rows of the head are not in the order of the classes
        means = torch.randn(2, backbone.feature_dim)
        head.add_classes(task, means)
    names = [f"class {index}" for index in range(classes)]
    facts = ModelFacts(
        "magmax", "run", {"class": type(backbone).__name__}, type(head).__name__, "Full()", None, "", names, []
    )
    return FinalModel(module.eval(), facts, list(range(classes)))


@pytest.mark.parametrize(("name", "size"), [("test_vit", None), ("test_vit", 96), ("test_resnet", None)])
def test_timm_loads_the_folder_with_the_head_as_its_classifier(tmp_path, name, size):
    torch.manual_seed(0)
    model = grown(Timm(name, image_size=size), LinearHead())
    images = batch(size or 160)
    with torch.no_grad():
        expected = model.module(images)
    assert export(model, "hf-folder", tmp_path / "out") == "timm"
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(images), expected, atol=1e-5)
    assert timm.data.resolve_data_config({}, model=loaded)["input_size"][1:] == (size or 160, size or 160)
    options = {} if size is None else {"img_size": size}
    file = str(tmp_path / "out" / "model.safetensors")
    by_name = timm.create_model(name, num_classes=4, checkpoint_path=file, **options).eval()
    with torch.no_grad():
        assert torch.equal(by_name(images), loaded(images))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == model.facts.classes
    assert not (tmp_path / "out" / "head.safetensors").exists()


def test_a_head_that_is_no_linear_layer_lies_beside_a_timm_model(tmp_path):
    model = grown(Timm("test_vit"), CosineHead())
    export(model, "timm", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = batch(160)
    with torch.no_grad():
        assert torch.allclose(loaded(images), model.module.backbone(images), atol=1e-5)
    assert (tmp_path / "out" / "head.safetensors").is_file()


@pytest.mark.parametrize("which", ["text_run", "learned_run"])
def test_onnx_gives_the_same_logits(folders, tmp_path, which):
    runtime = pytest.importorskip("onnxruntime")
    out, images = tmp_path / "out", batch(28, seed=1)
    assert main(["export", str(folders[which]), "--to", "onnx", "--out", str(out)]) == 0
    session = runtime.InferenceSession(str(out / "model.onnx"))
    for some in (images, images[:1]):
        (found,) = session.run(None, {"images": some.numpy()})
        expected, _ = scores_of(folders[which], "magmax", some)
        assert np.allclose(found, expected.numpy(), atol=1e-3)


def test_without_its_packages_onnx_is_refused(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clmerge.runs.exported.find_spec", lambda name: None)
    assert main(["export", str(folders["text_run"]), "--to", "onnx", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'clmerge[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card(folders, tmp_path, capsys):
    run, out = folders["text_run"], tmp_path / "out"
    assert main(["export", str(run), "--to", "hf-folder", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    results = json.loads((run / "results.json").read_text())["runs"][0]
    last = results["models"]["magmax"]["task_agnostic"]["R"][-1]
    assert "# magmax of text" in card
    assert "merged by `MagMax(scale=0.5)`" in card
    assert "28 x 28 pixels" in card
    assert "| magmax | task-agnostic | " + " | ".join(f"{100 * value:.1f}" for value in last) in card
    assert "license:" not in card
    assert "- **Licence**: none is stated." in card
    assert "- **Made from**: the base model `nano` and its fine-tuning on 2 tasks: " in card
    assert 'create_model_and_transforms("local-dir:FOLDER")' in card
    found, _ = open_final_model(str(run), model="expert", task=None)
    assert found.facts.rule is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "timm"], 1, "expected a backbone of timm for --to timm, got OpenClip"),
        (["--to", "onx"], 2, "did you mean 'onnx'?"),
        (["--to", "open_clip", "--model", "x"], 1, "expected one of the models magmax"),
        (["--to", "open_clip", "--model", "EMR"], 1, "expected --task for emr"),
        (["--to", "open_clip", "--task", "1"], 1, "expected no --task for magmax"),
        (["--to", "open_clip", "--ot", "1"], 2, "did you mean --out?"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, code, message, folders, tmp_path, capsys):
    try:
        found = main(["export", str(folders["text_run"]), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert (found, "Traceback" in error) == (code, False)
    assert message in error


def test_the_statement_about_the_models_of_a_run(folders):
    """What the files were made from, read by in-toto's library, without the paths of the machine."""
    run = folders["text_run"]
    document = json.loads((run / "model" / "models.intoto.json").read_text())
    named = {one["name"]: one["digest"]["sha256"] for one in document["subject"]}
    assert named == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (run / "model").glob("*.safetensors")
    }
    found = document["predicate"]["buildDefinition"]
    assert found["buildType"] == "urn:clmerge:fit:v1"
    assert found["externalParameters"]["mergers"]["magmax"] == "MagMax(scale=0.5)"
    base, *others = found["resolvedDependencies"]
    assert (base["name"], len(base["digest"]["clmerge-tensors-sha256"])) == ("nano", 64)
    digests = {one["name"]: one["digest"] for one in others}
    for task in range(2):
        name = f"bank/task_00{task}.safetensors"
        content = hashlib.blake2b((run / name).read_bytes(), digest_size=16).hexdigest()
        assert digests[name] == {"blake2b-128": content}
    assert digests["config.yaml"] == {"sha256": hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()}
    assert str(run.parent.parent) not in json.dumps(document)
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement, statement_pb2

    statement.Statement.copy_from_pb(json_format.Parse(json.dumps(document), statement_pb2.Statement())).validate()


def test_the_card_has_the_base_of_a_hub_and_what_probes_found():
    module = ContinualClassifier(OpenClip("nano"), LinearHead())
    backbone = {"class": "OpenClip", "settings": {"name": "hf-hub:org/clip"}, "hub": "org/clip", "revision": "0a" * 20}
    tasks = [{"name": "cats", "classes": [0]}]
    facts = ModelFacts("m", "r", backbone, "LinearHead", "Full()", None, "", ["a"], tasks)
    module.begin_stream(1)
    module.head.add_classes([0])
    results = Results(["only"], classes=[["a"]])
    results.add_row("m", [1.0], [1.0])
    results.add_probe("m", "attack_success", Measured(0.5, n=4), better="lower", share=True)
    card = model_card(FinalModel(module.eval(), facts, [0]), results, "open_clip")
    assert "\nbase_model: org/clip\n---\n" in card
    assert f"`hf-hub:org/clip` (`org/clip` on Hugging Face's hub at commit `{'0a' * 20}`)" in card
    assert "and its fine-tuning on 1 tasks: cats." in card
    assert "| attack_success | 50.0 [15.0, 85.0] | lower |" in card


def test_a_model_in_tangent_space_says_so(tmp_path):
    module = ContinualClassifier(OpenClip("nano"), LinearHead(), tuning=Linearized())
    facts = ModelFacts("m", "r", {"class": "OpenClip"}, "LinearHead", "Linearized()", None, "", ["a"], [])
    module.begin_stream(1)
    module.head.add_classes([0])
    model = FinalModel(module.eval(), facts, [0])
    results = Results(["only"], classes=[["a"]])
    results.add_row("m", [1.0], [1.0])
    assert export(model, "open_clip", tmp_path / "out") == "open_clip"
    assert "of the linearised model" in model_card(model, results, "open_clip")
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert loaded.visual.image_size in (28, (28, 28))


def test_adapters_are_no_part_of_a_model_of_open_clip(tmp_path):
    module = ContinualClassifier(OpenClip("nano"), LinearHead(), tuning=Adapters())
    facts = ModelFacts("m", "r", {"class": "OpenClip"}, "LinearHead", "Adapters()", None, "", ["a"], [])
    module.begin_stream(1)
    module.head.add_classes([0])
    model = FinalModel(module.eval(), facts, [0])
    with pytest.raises(ValueError, match="got bottleneck adapters, which stay part of the model"):
        export(model, "hf-folder", tmp_path / "out")
    export(model, "safetensors", tmp_path / "out")
    assert any("adapter_down" in name for name in load_tensors(tmp_path / "out" / "model.safetensors"))


def test_a_failure_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("clmerge.runs.model_card.model_card", full)
    assert main(["export", str(folders["text_run"]), "--to", "open_clip", "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(folders, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(["export", str(folders["text_run"]), "--to", "open_clip", "--out", str(tmp_path)]) == 1
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
