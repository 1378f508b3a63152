import csv

import pytest
from streams.tiny_layouts import save_image

from clmerge.streams import ClassIncremental, DomainIncremental, TableDomains, TableSource, TaskIncremental
from clmerge.streams.decoding import UnreadableImageError

HEADER = ["path", "label", "split", "domain"]


def rows_of(labels=("cat", "dog"), splits=("train", "test", "val"), domains=("home", "street"), each=2):
    return [
        [f"{domain}/{label}_{split}_{number}.png", label, split, domain]
        for domain in domains
        for label in labels
        for split in splits
        for number in range(each)
    ]


def write_images(top, rows):
    for number, row in enumerate(rows):
        save_image(top / row[0], shade=number)


def write_csv(path, rows, header=HEADER, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.fixture
def table(tmp_path):
    rows = rows_of()
    write_images(tmp_path, rows)
    return write_csv(tmp_path / "labels.csv", rows)


def test_paths_labels_and_splits(table):
    source = TableSource(table)
    assert (source.name, source.class_names) == ("labels", ["cat", "dog"])
    assert [len(images) for images in (source.train(), source.test(), source.val())] == [8, 8, 8]
    assert all("_train_" in path.name for path in source.train().paths)
    image, target = source.val()[7]
    assert (image.getpixel((0, 0)), target) == ((23, 23, 0), 1)
    assert source.train().where(0).endswith("home/cat_train_0.png")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_empty_lines_and_a_byte_order_mark(tmp_path, table, delimiter):
    other = write_csv(tmp_path / "other.csv", rows_of(), delimiter=delimiter)
    other.write_text("\ufeff" + other.read_text(encoding="utf-8") + "\r\n\r\n", encoding="utf-8")
    assert TableSource(other).train().paths == TableSource(table).train().paths


def test_without_splits_the_test_images_are_cut(tmp_path):
    rows = [row[:2] for row in rows_of(splits=["x"], domains=["a"], each=10)]
    write_images(tmp_path, rows)
    source = TableSource(write_csv(tmp_path / "all.csv", rows, HEADER[:2]), test_fraction=0.3)
    assert (len(source.train()), len(source.test()), source.val()) == (14, 6, None)
    assert set(source.train().paths).isdisjoint(source.test().paths)


def test_the_validation_images_of_the_table_are_used_in_place_of_a_cut(table):
    stream = ClassIncremental(TableSource(table), num_tasks=2, val_fraction=0.5)
    assert [len(stream.dataset(1, split)) for split in ("train", "val", "test")] == [4, 4, 4]


def test_numbers_are_ordered_by_value_and_may_have_names(tmp_path):
    rows = rows_of(labels=("10", "9"))
    write_images(tmp_path / "images", rows)
    table = write_csv(tmp_path / "numbers.csv", rows, ["file", "class", "split", "domain"])
    options = {"root": tmp_path / "images", "path_column": "file", "label_column": "class"}
    source = TableSource(table, **options)
    assert source.class_names == ["9", "10"]
    assert "9_train" in source.train().paths[source.train().targets.index(0)].name
    assert TableSource(table, names=["nine", "ten"], **options).class_names == ["nine", "ten"]
    with pytest.raises(RuntimeError, match=r"names for the 2 labels of .*, which are '9', '10', got 1 names"):
        _ = TableSource(table, names=["nine"], **options).class_names


def test_domains(table):
    group = TableDomains(TableSource(table, templates=["a {}."]), domains=["street", "home"])
    stream = DomainIncremental(group)
    assert [task.name for task in stream.tasks] == ["street", "home"]
    assert stream.class_names == ["cat", "dog"]
    assert [len(stream.dataset(0, split)) for split in ("train", "val", "test")] == [4, 4, 4]
    assert stream.class_prompts == [["a cat."], ["a dog."]]
    assert TaskIncremental(TableDomains(TableSource(table))).class_names == [
        "home: cat", "home: dog", "street: cat", "street: dog",
    ]  # fmt: skip
    assert TableDomains(TableSource(table, name="DomainNet")).sources()[0].templates[0].count("{}") == 1
    assert not TableDomains(TableSource(table, name="DomainNet")).sources()[0].has_plain_templates
    with pytest.raises(RuntimeError, match=r"rows of domain 'office' in column 'domain' of .*, found 'home', 'street'"):
        TableDomains(TableSource(table), domains=["office"]).sources()
    with pytest.raises(RuntimeError, match=r"expected a column 'task' in .* name the one to use with domain_column"):
        TableDomains(TableSource(table), domain_column="task").sources()


def test_classes_of_a_domain_are_those_that_occur_in_it(tmp_path):
    rows = rows_of(labels=("1", "2"), domains=["a"]) + rows_of(labels=("3",), domains=["b"])
    write_images(tmp_path, rows)
    source = TableSource(write_csv(tmp_path / "t.csv", rows), names=["one", "two", "three"])
    assert [part.class_names for part in TableDomains(source).sources()] == [["one", "two"], ["three"]]


def changed(rows, number, column, text):
    rows[number][column] = text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: changed(rows, 2, 1, " "), r"expected a label in line 4 of .*t\.csv, got an empty cell"),
        (lambda rows: changed(rows, 0, 0, ""), r"expected a path in line 2 of .*t\.csv, got an empty cell"),
        (lambda rows: changed(rows, 3, 2, "tset"), r"expected a split in line 5 of .*, one of train, .* got 'tset'"),
        (
            lambda rows: changed(rows, 4, 0, rows[1][0]),
            r"every image once, got 'home/cat_train_1\.png' in line 6 of .* and in line 3 of",
        ),
        (lambda rows: rows[5].append("x"), r"expected 4 cells in line 7 of .*t\.csv, as line 1 has, got 5"),
        (lambda rows: rows.clear(), "expected rows with images in .*, found none"),
        (lambda rows: [row.__setitem__(2, "dev") for row in rows], r"expected 'train' rows in .*t\.csv, got 24 val"),
        (
            lambda rows: [row.__setitem__(2, "trn") for row in rows],
            r"expected 'test' rows in .*, got 24 train: leave the column of splits out",
        ),
    ],
)
def test_what_is_wrong_and_where(tmp_path, table, change, message):
    rows = rows_of()
    change(rows)
    with pytest.raises(RuntimeError, match=message):
        TableSource(write_csv(tmp_path / "t.csv", rows)).train()


def test_columns_and_files_that_are_not_there(tmp_path, table):
    with pytest.raises(RuntimeError, match=r"CSV or Parquet table at .*none\.csv, found no such file"):
        TableSource(tmp_path / "none.csv").train()
    for option in ("path_column", "label_column", "split_column"):
        with pytest.raises(RuntimeError, match=f"a column 'x' in .*, found .*: name the one to use with {option}"):
            TableSource(table, **{option: "x"}).train()
    with pytest.raises(RuntimeError, match=r"an image at .*no/home/cat_train_0\.png, as line 2 of .* says.*set root"):
        TableSource(table, root=tmp_path / "no").train()
    (tmp_path / "home" / "cat_train_0.png").unlink()
    with pytest.raises(UnreadableImageError, match=r"cat_train_0\.png, got no such file \(line 2 of .*labels\.csv\)"):
        TableSource(table).train().image(0)
    (tmp_path / "bad.csv").write_bytes(b"path,label\n\xff,1\n")
    with pytest.raises(RuntimeError, match="table in UTF-8"):
        TableSource(tmp_path / "bad.csv").train()
    (tmp_path / "open.csv").write_text('path,label\na.png,"cat\n')
    with pytest.raises(RuntimeError, match=r"comma-separated values in line 2 of .*open\.csv, got"):
        TableSource(tmp_path / "open.csv").train()
    (tmp_path / "twice.csv").write_text("path,path\na.png,b.png\n")
    with pytest.raises(RuntimeError, match="different names of columns in line 1"):
        TableSource(tmp_path / "twice.csv").train()
    with pytest.raises(ValueError, match="test_fraction"):
        TableSource(table, test_fraction=1.0)


def test_parquet(tmp_path, table):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = rows_of(labels=("0", "1"))
    write_images(tmp_path, rows)
    columns = dict(zip(HEADER, map(list, zip(*rows, strict=True)), strict=True))
    columns["label"] = [float(label) for label in columns["label"]]  # as pandas has them where a cell is empty
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    source = TableSource(tmp_path / "t.parquet")
    assert (source.class_names, len(source.train()), len(source.val())) == (["0", "1"], 8, 8)
    columns["label"][2] = float("nan")
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(RuntimeError, match=r"expected a label in row 3 of .*t\.parquet, got an empty cell"):
        TableSource(tmp_path / "t.parquet").train()
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    with pytest.raises(RuntimeError, match=r"expected a Parquet table at .*bad\.parquet, got"):
        TableSource(tmp_path / "bad.parquet").train()


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(RuntimeError, match=r"expected pyarrow to read .*pip install 'clmerge\[parquet\]', or save"):
        TableSource(tmp_path / "t.parquet").train()
