"""Class heads and vocabularies of different size, against sums over rows in float64."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch.testing import assert_close

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.class_names import names_in
from clmerge.checkpoints.ledger import read_ledger
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.rows import row_names
from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import TIES, TaskArithmetic, WeightAverage

BODY = (7, 5)
OF_BASE, OF_A, OF_B = ["cat", "dog", "emu"], ["dog", "fox"], ["cow", "fox", "cat", "dog"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed, classes, start=None):
    body = drawn(*BODY, seed=seed) if start is None else start + 0.1 * drawn(*BODY, seed=seed)
    head = {} if classes is None else {"head.weight": drawn(len(classes), 7, seed=seed + 1)}
    return {"body.weight": body, **head, **({"head.bias": drawn(len(classes), seed=seed + 2)} if head else {})}


def write(path, state, classes=None):
    save_file(state, path, {"classes": json.dumps(classes)} if classes else None)
    return path


@pytest.fixture
def files(tmp_path):
    base = model(0, OF_BASE)
    states = [base, model(10, OF_A, base["body.weight"]), model(20, OF_B, base["body.weight"])]
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    for path, state, classes in zip(paths, states, (OF_BASE, OF_A, OF_B), strict=True):
        write(path, state, classes)
    return paths, states


def merged(paths, merger, folder, **options):
    job = CheckpointMerge(paths[0], models=paths[1:], merger=merger, **options)
    job.run(folder / "out.safetensors")
    assert verify(folder / "out.safetensors")[0] == []
    return job, load_file(folder / "out.safetensors")


def by_hand(states, name, scale):
    """Rows by class: the base's plus the sum of the models' changes, or the mean over the models that have it."""
    base, *models = [dict(zip(names, state[name].double(), strict=True)) for names, state in states]
    rows = {}
    for row in dict.fromkeys(row for _, names in enumerate((base, *models)) for row in names):
        if row in base:
            rows[row] = base[row] + scale * sum(one[row] - base[row] for one in models if row in one)
        else:
            found = [one[row] for one in models if row in one]
            rows[row] = sum(found) / len(found)
    return rows


def test_a_union_has_a_row_for_every_class(files, tmp_path):
    paths, states = files
    job, found = merged(paths, TaskArithmetic(0.5), tmp_path, heads="union", strict=True)
    for name in ("head.weight", "head.bias"):
        rows = by_hand(list(zip((OF_BASE, OF_A, OF_B), states, strict=True)), name, 0.5)
        assert list(rows) == ["cat", "dog", "emu", "fox", "cow"]
        assert_close(found[name].double(), torch.stack(list(rows.values())), rtol=1e-5, atol=1e-6)
    assert_close(
        found["body.weight"],
        states[0]["body.weight"] + 0.5 * sum(s["body.weight"] - states[0]["body.weight"] for s in states[1:]),
    )
    assert "union   'head.weight' ((3, 7) in" in job.describe()
    assert ": 5 rows by name, 3 of them the base's" in job.describe()
    assert open_checkpoint(tmp_path / "out.safetensors").classes == ["cat", "dog", "emu", "fox", "cow"]
    assert read_ledger(tmp_path / "out.safetensors").heads == "union"


def test_a_model_without_the_head_changes_no_row(files, tmp_path):
    paths, states = files
    body = {"body.weight": states[1]["body.weight"]}
    write(tmp_path / "c.safetensors", body)
    _, found = merged([*paths, tmp_path / "c.safetensors"], TaskArithmetic(0.5), tmp_path, heads="union", strict=True)
    rows = by_hand(list(zip((OF_BASE, OF_A, OF_B), states, strict=True)), "head.weight", 0.5)
    assert_close(found["head.weight"].double(), torch.stack(list(rows.values())), rtol=1e-5, atol=1e-6)


def test_a_union_of_heads_that_the_base_lacks(files, tmp_path):
    paths, states = files
    write(paths[0], {"body.weight": states[0]["body.weight"]})
    _, found = merged(paths, TIES(0.5), tmp_path, heads="union", strict=True)
    expected = torch.stack(
        [
            (states[1]["head.weight"][0] + states[2]["head.weight"][3]) / 2,
            (states[1]["head.weight"][1] + states[2]["head.weight"][1]) / 2,
            *states[2]["head.weight"][[0, 2]],
        ]
    )
    assert open_checkpoint(tmp_path / "out.safetensors").classes == ["dog", "fox", "cow", "cat"]
    assert_close(found["head.weight"], expected)
    assert found.keys() == {"body.weight", "head.weight", "head.bias"}


def test_rows_of_a_base_that_names_none_are_left_out(files, tmp_path):
    paths, states = files
    write(paths[0], states[0])
    job, found = merged(paths, WeightAverage(), tmp_path, heads="union")
    assert "4 rows by name, without the base's" in job.describe()
    assert_close(found["head.weight"][2:], states[2]["head.weight"][[0, 2]])


def test_the_first_head_or_none(files, tmp_path):
    paths, states = files
    job, found = merged(paths, WeightAverage(), tmp_path, heads="first", strict=True)
    assert torch.equal(found["head.weight"], states[1]["head.weight"])
    assert torch.equal(found["head.bias"], states[1]["head.bias"])
    assert "of the first model that has it: head.bias, head.weight ((2,) of" in job.describe()
    job, found = merged(paths, WeightAverage(), tmp_path, heads="drop", strict=True)
    assert found.keys() == {"body.weight"}
    assert "dropped 'head.weight' ((3, 7) in" in job.describe()
    write(paths[0], {"body.weight": states[0]["body.weight"]})
    _, found = merged(paths, WeightAverage(), tmp_path, heads="first", strict=True)
    assert torch.equal(found["head.weight"], states[1]["head.weight"])


def test_the_default_keeps_the_bases_and_says_what_else_there_is(files, tmp_path):
    paths, states = files
    job, found = merged(paths, WeightAverage(), tmp_path)
    assert torch.equal(found["head.weight"], states[0]["head.weight"])
    assert "heads   'head.weight' ((3, 7) in " in job.describe()
    assert "the base's is kept; see --heads" in job.describe()
    assert "see --heads" not in merged(paths, WeightAverage(), tmp_path, heads="base")[0].describe()
    assert "see --heads" not in merged(paths, WeightAverage(), tmp_path, exclude=["head.*"])[0].describe()


def test_a_union_without_names_names_shapes_and_the_option(files, tmp_path):
    paths, states = files
    write(paths[2], states[2])
    with pytest.raises(
        ValueError, match=r"'head\.\w+' \(\(3(, 7|,)\) in .*base\.safetensors, .*none in .*b\.safetensors.*--heads"
    ):
        CheckpointMerge(paths[0], models=paths[1:], merger=WeightAverage(), heads="union")
    write(paths[2], states[2], ["x"] * 4)
    with pytest.raises(ValueError, match=r"every row of .*b\.safetensors to have a name of its own, got 'x' twice"):
        CheckpointMerge(paths[0], models=paths[1:], merger=WeightAverage(), heads="union")
    with pytest.raises(ValueError, match=r"expected --heads of base, union, first, drop, got 'unoin'"):
        CheckpointMerge(paths[0], models=paths[1:], merger=WeightAverage(), heads="unoin")


@pytest.mark.parametrize("merger", [TaskArithmetic(0.5), TIES(0.5)], ids=repr)
def test_a_vocabulary_that_grew(merger, tmp_path):
    """Folders of Hugging Face whose tokenizers name the rows, in half precision, with more rows than one piece."""
    width, old = 64, 40_000
    tokens = [f"t{index}" for index in range(old)]
    base = {"embed.weight": drawn(old, width).bfloat16()}
    grown = torch.cat([base["embed.weight"].float() + 0.1 * drawn(old, width, seed=1), drawn(2, width, seed=2)])
    states = [base, {"embed.weight": grown.bfloat16()}, {"embed.weight": base["embed.weight"] + 1}]
    for index, (state, names) in enumerate(zip(states, (tokens, [*tokens, "<a>", "<b>"], tokens), strict=True)):
        folder = tmp_path / str(index)
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        added = [{"content": name, "id": place} for place, name in enumerate(names) if place >= old - 1]
        content = {
            "model": {"vocab": {name: place for place, name in enumerate(names[: old - 1])}},
            "added_tokens": added,
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    _, found = merged([tmp_path / str(index) for index in range(3)], merger, tmp_path, heads="union")
    cut = {name: tensor[:old] for name, tensor in states[1].items()}
    save_file(cut, tmp_path / "1" / "model.safetensors")
    assert torch.equal(found["embed.weight"][old:], states[1]["embed.weight"][old:])
    if isinstance(merger, TaskArithmetic):
        (tmp_path / "1" / "tokenizer.json").unlink()
        job = CheckpointMerge(tmp_path / "0", models=[tmp_path / "1", tmp_path / "2"], merger=merger)
        job.run(tmp_path / "cut.safetensors")
        assert torch.equal(found["embed.weight"][:old], load_file(tmp_path / "cut.safetensors")["embed.weight"])


class Tied(torch.nn.Module):
    def __init__(self, seed, is_tied):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight


def test_a_head_that_a_model_has_untied(tmp_path):
    models = [Tied(0, True), Tied(1, True), Tied(2, False)]
    for index, one in enumerate(models):
        save_model(one, str(tmp_path / f"{index}.safetensors"))
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    _, found = merged(paths, TaskArithmetic(0.5), tmp_path, strict=True)
    start, tied, untied = (one.state_dict() for one in models)
    for name in ("embed.weight", "head.weight"):
        assert_close(found[name], start[name] + 0.5 * (tied[name] + untied[name] - 2 * start[name]))
    _, found = merged(paths[:2], TaskArithmetic(0.5), tmp_path, strict=True)
    assert len(found) == 1


def test_names_of_classes_that_files_carry(tmp_path):
    assert names_in({"id2label": {"1": "b", "0": "a"}}) == ["a", "b"]
    assert names_in({"classes": ["a", 3]}) == names_in({"class_to_idx": {"a": 1}}) == names_in({}) == []
    state = {"w": torch.zeros(2, 3)}
    torch.save({"state_dict": state, "hyper_parameters": {"class_names": ["a", "b"]}}, tmp_path / "a.pt")
    assert row_names(open_checkpoint(tmp_path / "a.pt"), 2) == ["a", "b"]
    assert row_names(open_checkpoint(tmp_path / "a.pt"), 3) == []
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y"}}))
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({"t": 0, "u": 1}))
    (tmp_path / "hf" / "added_tokens.json").write_text(json.dumps({"v": 2}))
    assert row_names(open_checkpoint(tmp_path / "hf"), 2) == ["x", "y"]
    assert row_names(open_checkpoint(tmp_path / "hf"), 3) == ["t", "u", "v"]


def test_the_command(files, tmp_path, capsys):
    paths, _ = files
    command = ["merge", "--base", str(paths[0]), "--models", *map(str, paths[1:]), "--merger", "MagMax"]
    assert main([*command, "--heads", "union", "--out", str(tmp_path / "out.safetensors")]) == 0
    assert "5 rows by name" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--heads", "unoin", "--dry-run"])
    assert "union" in capsys.readouterr().err
    assert main([*command, "--heads", "first", "--lora-rank", "2", "--dry-run"]) == 1
    assert "got --heads first" in capsys.readouterr().err


def test_heads_of_one_shape_for_other_classes_are_noted(tmp_path):
    paths = []
    for index, classes in enumerate((None, ["cat", "dog"], ["dog", "cat"])):
        paths.append(write(tmp_path / f"{index}.safetensors", model(index, ["a", "b"]), classes))
    job, _ = merged(paths, WeightAverage(), tmp_path)
    assert "name 2 classes each, not the same ones in the same order" in job.describe()
    assert "rows of 'head.bias', 'head.weight' are merged by position" in job.describe()
    write(paths[2], model(2, ["a", "b"]), ["cat", "dog"])
    job, _ = merged(paths, WeightAverage(), tmp_path)
    assert "by position" not in job.describe()
