"""Typos are answered in one sentence and at once, and nothing is refused that the parser takes."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clmerge.cli import main
from clmerge.cli.fit import build_parser, spread_lists
from clmerge.cli.option_table import FILE, OptionTable, nearest, option_table
from clmerge.cli.option_values import in_words
from clmerge.cli.quick_check import check_arguments
from clmerge.cli.value_check import OptionError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TYPOS = [
    ("fit --max_epochs=3", "an option of clmerge fit, got --max_epochs; did you mean --trainer.max_epochs?"),
    ("fit --learner.start_polcy=base", "got --learner.start_polcy; did you mean --learner.start_policy?"),
    ("fit --data.batch_sise=3", "did you mean --data.batch_size?"),
    ("fit --trainer.max_epoch=3", "did you mean --trainer.max_epochs?"),
    ("fit --trainer.logger=true", "got --trainer.logger; clmerge fit --help names them all"),
    ("fit --mergers TEIS", "the name of a merger for --mergers, got 'TEIS'; did you mean TIES?"),
    ("fit --mergers MagMax TEIS", "did you mean TIES?"),
    ("fit --mergers=TEIS", "did you mean TIES?"),
    ("fit --mergers.help TEIS", "did you mean TIES?"),
    (
        "fit --mergers='[MagMax, {class_path: TIES, init_args: {densty: 0.2}}]'",
        "a setting of TIES, got --mergers.densty",
    ),
    ("fit --mergers='[{class_path: TIES, density: 0.2}]'", "the settings of TIES under init_args, got 'density'"),
    ("fit --model.tuning=Lora", "the name of a tuning for --model.tuning, got 'Lora'; did you mean LoRA?"),
    ("fit --model.tuning=LoRA --model.tuning.rnk=8", "a setting of LoRA, got --model.tuning.rnk; did you mean rank?"),
    ("fit --model.tuning=LoRA --model.tuning.scope=x", "a setting of LoRA, got --model.tuning.scope; its settings are"),
    ("fit --model.tuning=Full --model.tuning.x=1", "a setting of Full, got --model.tuning.x; it has no settings"),
    ("fit --model.tuning.rankk=8", "a setting of one of its classes, got --model.tuning.rankk; did you mean rank?"),
    ("fit --model.backbone=OpenClipp", "did you mean OpenClip?"),
    ("fit --model.backbone.nam=x", "a setting of OpenClip, got --model.backbone.nam; did you mean name?"),
    ("fit --model.backbone.help Tim", "did you mean Timm?"),
    ("fit --model.backbone='{class_path: Timm, init_args: {nme: x}}'", "a setting of Timm"),
    ("fit --model.head=LinearHed", "did you mean LinearHead?"),
    ("fit --model.head=Elephant", "got 'Elephant'; there are CosineHead, LinearHead, ZeroShotHead"),
    ("fit --model.optimizer=AdmW", "the name of an optimizer for --model.optimizer, got 'AdmW'; did you mean AdamW?"),
    ("fit --model.optimizer.lr=abc", "a number for --model.optimizer.lr, got 'abc'"),
    ("fit --model.regularizers=[EWCC]", "did you mean EWC?"),
    ("fit --model.regularizers='[{class_path: EWC, init_args: {strenght: 3}}]'", "did you mean strength?"),
    (
        "fit --model.loss_classes curent",
        "'current', 'seen' or 'all' for --model.loss_classes, got 'curent'; did you mean",
    ),
    ("fit --learner.start_policy=bse", "did you mean 'base'?"),
    ("fit --learner.epochs=[1,2,three]", "a whole number for --learner.epochs, got 'three'"),
    ("fit --learner.calibrations=[SampleTunning]", "did you mean SampleTuning?"),
    (
        "fit --learner.calibrations='[{class_path: Repair, init_args: {adaptation: {sourc: val}}}]'",
        "expected a setting of Repair, got --learner.calibrations.adaptation.sourc; did you mean adaptation.source?",
    ),
    (
        "fit --learner.calibrations='[{class_path: Repair, init_args: {adaptation: {source: vall}}}]'",
        "for --learner.calibrations.adaptation.source, got 'vall'; did you mean 'val'?",
    ),
    ("fit --stream.num_tasks=two", "a whole number for --stream.num_tasks, got 'two'"),
    ("fit --stream.num_taks=2", "a setting of ClassIncremental, got --stream.num_taks; did you mean num_tasks?"),
    (
        "fit --stream.class_order=randm",
        "a list of whole numbers for --stream.class_order, got 'randm'; did you mean 'ran",
    ),
    ("fit --stream.class_order=[1,x]", "a whole number for --stream.class_order, got 'x'"),
    ("fit --stream.source=ImageFoldrSource", "the name of a data source for --stream.source"),
    ("fit --stream.source=ImageFolderSource --stream.source.rot=x", "a setting of ImageFolderSource"),
    ("fit --stream.source.help ImageFoldrSource", "did you mean ImageFolderSource?"),
    (
        "fit --stream=ClassIncremental --stream.source.help Npz",
        "the name of a data source for --stream.source, got 'Npz'",
    ),
    ("fit --data.cache_eval=maybe", "true or false for --data.cache_eval, got 'maybe'"),
    ("fit --data.replay=al", "a whole number or 'all' for --data.replay, got 'al'; did you mean 'all'?"),
    ("fit --data.replay=[3]", "a whole number or 'all' for --data.replay, got [3]"),
    ("fit --data.batch_size='{a: 1}'", "a whole number for --data.batch_size, got {'a': 1}"),
    ("fit --seed one", "a whole number for --seed, got 'one'"),
    ("fit --skip_unreadable=ja", "true or false"),
    ("fit --logging.extra=[TensorBordLogger]", "did you mean TensorBoardLogger?"),
    ("fit --trainer.max_epochs=many", "a whole number for --trainer.max_epochs, got 'many'"),
    ("fit --trainer.callbacks+=EarlyStoping", "the name of a callback for --trainer.callbacks"),
    ("fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr=x", "a setting of EarlyStopping"),
    ("fit --data.augmentation=[RandomHorizontalFlp]", "the name of a transform for --data.augmentation"),
    (
        "fit --data.augmentation='[{class_path: RandomHorizontalFlip, init_args: {prob: 1}}]'",
        "a setting of RandomHoriz",
    ),
    ("fit --name", "a value after --name, got none"),
    ("fit --mergers --seed=1", "a value after --mergers, got none"),
    ("fit stray.yaml", "options that begin with --, got 'stray.yaml'; did you mean --config stray.yaml?"),
    ("fit stray", "options that begin with --, got 'stray'"),
    ("fit --config nowhere.yaml", "a file for --config, got nowhere.yaml"),
    ("fit --config configs/quickstar.yaml", "did you mean configs/quickstart.yaml?"),
    ("fit --resum runs/a", "did you mean --resume?"),
    ("merge --merger TEIS", "the name of a merger for --merger, got 'TEIS'"),
    ("merge --merger TIES --merger.densty=0.2", "did you mean density?"),
    ("merge --merger TIES --merger.density=half", "a number for --merger.density"),
    ("merge --shardsize=5GB", "did you mean --shard-size?"),
    ("merge --models --out=x", "a value after --models, got none"),
    ("merge --origin=bse", "'base' or 'zero' for --origin, got 'bse'; did you mean 'base'?"),
    ("merge --recipe='{merger: TEIS}'", "did you mean TIES?"),
    ("compare", "RUN after clmerge compare, got none"),
    ("compare runs/a --mergers TEIS", "did you mean TIES?"),
    ("compare runs/a --scale-rul", "did you mean --scale-rule?"),
    ("compare runs/a --orders=ten", "a whole number for --orders, got 'ten'"),
    ("compare runs/a --evaluation=aware", "did you mean 'task_aware'?"),
    ("report", "RUN after clmerge report, got none"),
    ("report runs/a --format=latx", "'html', 'md' or 'latex' for --format, got 'latx'; did you mean 'latex'?"),
    ("report runs/a --tilte=x", "did you mean --title?"),
]
RIGHT = [
    "--model.backbone=Timm --model.backbone.name=vit_tiny_patch16_224",
    "--model.tuning=clmerge.models.LoRA --model.tuning.rank=8",
    "--model.optimizer=torch.optim.SGD --model.optimizer.lr=1e-3 --model.optimizer.momentum=0.9",
    "--model.optimizer.lr=.inf",
    "--model.optimizer.lr=0x1",
    "--model.head=null",
    "--data.batch_size=1_0 --data.cache_eval=Yes --data.replay=all --data.eval_batch_size=null",
    "--data.cache_eval=off",
    "--stream.class_order=[9,8,7,6,5,4,3,2,1,0] --stream.max_val=~",
    "--stream.source=ImageFolderSource --stream.source.root=x --stream.source.templates='[a {}]'",
    "--stream='{class_path: TaskIncremental, init_args: {sources: [SklearnDigits]}}'",
    "--stream=TaskIncremental --stream.sources=DomainFolders --stream.sources.root=x --stream.sources.domains=[a,b]",
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss --trainer.precision=bf16-mixed",
    "--trainer.callbacks='[{class_path: EarlyStopping, init_args: {monitor: val/loss}}]' --trainer.devices=[0,1]",
    "--trainer.deterministic=warn --trainer.limit_train_batches=0.5 --trainer.accelerator=cpu --trainer.max_time=1:00",
    "--mergers='[{class_path: Pipeline, init_args: {reducer: TIES, sparsifier: {class_path: RandomDrop}}}]'",
    "--mergers=MagMax --learner.deploy=expert --learner.epochs=[1,2,3,4,5]",
    "--mergers+=TIES --mergers.density=0.2",
    "--data.augmentation='[{class_path: RandomResizedCrop, init_args: {size: 28, scale: [0.5, 1]}}, RandAugment]'",
    "--learner.branch_merger=TIES --learner.branch_merger.density=0.5 --learner.calibrations=[SampleTuning]",
    "--logging='{csv: false, tags: [a]}' --logging.group=null --logging.tags+=b",
    "--trainer.devices='[0]' --name='[a]' --run_dir='{x}' --data.batch_size='!!int 3'",
    "--check_data --skip_unreadable true --name 1 --run_dir=x",
]


def words_of(line):
    command, *words = shlex.split(line)
    if command == "fit" and "--config" not in words:
        words = ["--config", str(QUICKSTART), *words]
    return command, spread_lists(words)


@pytest.mark.parametrize(("line", "message"), TYPOS, ids=[line for line, _ in TYPOS])
def test_a_typo_is_answered_in_one_sentence(line, message):
    with pytest.raises(OptionError) as caught:
        check_arguments(*words_of(line))
    text = str(caught.value)
    assert text.startswith("expected ")
    assert message in text
    assert "\n" not in text
    assert not any(word in text for word in ("Namespace", "NestedArg", "Union", "class_path:", "typing"))


@pytest.fixture(scope="module")
def parsers():
    from clmerge.cli import compare, merge, report

    return {"fit": build_parser(), **{m.__name__.split(".")[-1]: m.build_parser() for m in (compare, merge, report)}}


def test_what_is_refused_at_once_the_parser_refuses_too(parsers, capsys):
    accepted = []
    for line, _ in TYPOS:
        command, words = words_of(line)
        try:
            parsers[command].parse_args(words)
            accepted.append(line)
        except SystemExit as stop:
            if stop.code != 2:
                accepted.append(line)
        text = capsys.readouterr().err
        assert not any(word in text for word in ("Namespace(", "NestedArg(", "Union subtypes", "typing.")), text
    assert accepted == []


def refuses(parser, words):
    try:
        parser.parse_args(words)
    except SystemExit as stop:
        return stop.code == 2
    return False


VALUES = (
    *("1", "0.5", "true", "null", "abc", "[1,2]", "{}", "1e3", "all", "{a: 1}", "x.y", ".5", "'3'", "[a, b]", "-1"),
    *("off", "[]", '""', "0x1f", "[[1]]", "[{class_path: TIES}]", "TIES", "[TIES]", "+3", "1_000", "~", "True", "None"),
    *("inf", "12:30", "a: 1", "&a 3", "!!int 3", "'true'", " 3 ", "@x", "{class_path: SGD, init_args: {lr: 1}}"),
)
CLASSES = {
    "stream": "clmerge.streams.ClassIncremental",
    "stream.source": "clmerge.streams.SklearnDigits",
    "model.backbone": "clmerge.models.OpenClip",
    "model.optimizer": "torch.optim.AdamW",
}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["fit", "compare", "merge", "report"])
def test_no_value_is_refused_that_the_parser_takes(command, parsers, capsys):
    table = option_table()
    options = [*table.commands[command]["options"]]
    if command == "fit":
        options += [f"{key}.{setting}" for key, path in CLASSES.items() for setting in table.settings(path)]
    given = {"fit": ["--config", str(QUICKSTART)], "merge": []}.get(command, ["runs/a"])
    refused, wrong = 0, []
    for option in options:
        for value in VALUES if option not in ("config", "recipe", "verify", "resume") else ():
            words = spread_lists([*given, f"--{option}={value}"])
            try:
                check_arguments(command, words)
                continue
            except OptionError as error:
                refused += 1
                message = str(error)
            if not refuses(parsers[command], words):
                wrong.append(f"--{option}={value}: {message}")
            assert "NoneType" not in capsys.readouterr().err
    assert wrong == []
    assert refused > 20


@pytest.mark.parametrize("line", RIGHT)
def test_what_is_right_is_let_through(line, parsers):
    command, words = words_of(f"fit {line}")
    parsers["fit"].parse_args(words)
    check_arguments(command, words)


CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "wandb"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_let_through(config):
    check_arguments("fit", ["--config", str(config)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("modle: {backbone: OpenClip}", "an option of clmerge fit in own.yaml, got modle; did you mean model?"),
        ("model: {bakbone: OpenClip}", "got model.bakbone; did you mean model.backbone?"),
        ("trainer: {max_epoch: 3}", "got trainer.max_epoch; did you mean trainer.max_epochs?"),
        ("seed: one", "a whole number for seed in own.yaml, got 'one'"),
        ("mergers: [MagMax, TEIS]", "a merger for mergers in own.yaml, got 'TEIS'"),
        (
            "stream: {class_path: ClassIncremental, init_args: {num_taks: 2}}",
            "got stream.num_taks in own.yaml; did you",
        ),
        (
            "stream: {class_path: ClassIncremental, init_args: {source: {class_path: NpzSource, init_args: {pth: x}}}}",
            "a setting of NpzSource, got stream.source.pth in own.yaml; did you mean path?",
        ),
        ("stream: {class_path: ClassIncremental, num_tasks: 2}", "under init_args, got 'num_tasks' beside class_path"),
        (
            "model: {optimizer: {class_path: AdamW, init_args: {lr: fast}}}",
            "a number for model.optimizer.lr in own.yaml",
        ),
    ],
)
def test_a_typo_in_a_configuration_names_the_file(config, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(config)
    with pytest.raises(OptionError) as caught:
        check_arguments("fit", ["--config", "own.yaml"])
    assert message in str(caught.value)


@pytest.mark.parametrize("config", ["stream: [", "a: &a [*a]", "\x00", "- 1", "{}"])
def test_what_is_no_configuration_is_left_to_the_parser(config, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(config)
    check_arguments("fit", ["--config", str(file)])


def test_other_versions_of_lightning_and_torch_may_have_other_options():
    table = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    newer = OptionTable(table | {"versions": table["versions"] | {"lightning": "99"}})
    for line in (
        "--trainer.new_option=3",
        "--trainer.callbacks+=NewCallback",
        "--trainer.callbacks+=EarlyStopping --trainer.callbacks.new=3",
        "--model.optimizer=NewOptimizer",
    ):
        with pytest.raises(OptionError):
            check_arguments(*words_of(f"fit {line}"))
        check_arguments(*words_of(f"fit {line}"), table=newer)
    with pytest.raises(OptionError, match="did you mean TIES"):
        check_arguments(*words_of("fit --mergers TEIS"), table=newer)


def test_a_class_of_ones_own_is_left_to_the_parser():
    check_arguments(*words_of("fit --mergers=[my_rules.Mean] --model.tuning=my.Tuning --model.tuning.depth=3"))


@pytest.mark.parametrize(
    ("words", "stream"),
    [
        (["--stream.source.help", "ImageFolderSource"], "--stream=ClassIncremental"),
        (["--stream.source.help=ImageFolderSource"], "--stream=ClassIncremental"),
        (["--stream.sources.help", "DomainFolders"], "--stream=DomainIncremental"),
    ],
)
def test_the_help_of_a_setting_needs_no_class_around_it(words, stream, capsys):
    assert check_arguments("fit", words) == [stream, *words]
    assert check_arguments("fit", [stream, *words]) == [stream, *words]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *words])
    assert stop.value.code == 0
    assert "root" in capsys.readouterr().out


def test_the_table_has_every_command_and_every_class_has_a_line():
    table = option_table()
    assert set(table.commands) >= {"fit", "compare", "merge", "report"}
    assert [
        path for path, one in table.classes.items() if path.startswith("clmerge.merging") and not one["summary"]
    ] == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("int", "a whole number"),
        ({"union": ["str", "null"]}, "text"),
        ({"union": [{"choices": ["a", "b"]}, {"list": "int"}]}, "'a', 'b' or a list of whole numbers"),
        ({"list": {"union": ["int", "str"]}}, "a list of values"),
        ({"kind": "Optimizer"}, "an optimizer"),
    ],
)
def test_types_in_words(kind, words):
    assert in_words(kind) == words


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("list", ["fit", "merge", "list"], "list"),
        ("lst", ["fit", "merge"], None),
        ("--versio", ["merge", "--version"], "--version"),
        ("trainer.logger", ["trainer.profiler"], None),
        ("TIES", [], None),
    ],
)
def test_the_nearest_word(word, known, expected):
    assert nearest(word, known) == expected


def test_a_typo_is_answered_without_torch():
    code = (
        "import sys, time; from clmerge.cli import main\n"
        "started = time.process_time()\n"
        "try: main(['fit', '--config', sys.argv[1], '--mergers', 'TEIS'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert not {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert time.process_time() - started < 0.3"
    )
    done = subprocess.run([sys.executable, "-c", code, str(QUICKSTART)], capture_output=True, text=True, check=True)
    assert done.stderr == ("clmerge fit: expected the name of a merger for --mergers, got 'TEIS'; did you mean TIES?\n")


def test_the_command_line_ends_with_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--learner.start_polcy=base"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
