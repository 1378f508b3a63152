from pathlib import Path

import pytest

from clmerge.names import file_name, safe_name, shorten, shown, task_label, visible

HOSTILE = [
    "../../x",
    "..",
    ".",
    "",
    " ",
    "a/b",
    "a\\b",
    "\0",
    "x" * 3000,
    "\u00e9" * 400,
    "\x1b[31m",
    "\ud800",
    ".hidden",
    "C:",
    "a.",
]


@pytest.mark.parametrize(
    "name", ["ties_density0.1", "magmax", "\u0444\u043e\u0442\u043e", "\u4e2d\u6587 1", "ties@seed0"]
)
def test_ordinary_names_are_kept(name):
    assert file_name(name) == shown(name) == visible(name) == name


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_name_stays_in_its_folder(name, tmp_path):
    part = file_name(name)
    file = tmp_path / f"{part}.png"
    file.touch()
    assert file.resolve().parent == tmp_path.resolve()
    assert not part.startswith(".")
    assert Path(part).name == part


def test_different_names_have_different_files():
    names = [*HOSTILE, "_.._x", "a_b", "_", *("x" * length for length in (121, 122))]
    assert len({file_name(name) for name in names}) == len(set(names))


@pytest.mark.parametrize(
    "text", ["\x1b]0;title\x07", "\u202eevil", "\u2066a", "\x9b31m", "\ud800", "a\r\n\tb", "\u2028", "\u200b"]
)
def test_what_steers_or_hides_is_written_out(text):
    found = visible(text)
    assert found.isprintable()
    assert "\\" in found


def test_text_of_several_lines_can_keep_them():
    assert visible("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"


def test_joiners_of_scripts_and_emoji_stay():
    assert (
        visible("\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e")
        == "\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e"
    )


def test_blank_names_are_seen():
    assert [shown(""), shown("  ")] == ['""', '"  "']
    assert len(shorten("x" * 3000, 18)) == 18


def test_safe_name_is_never_empty():
    assert safe_name("/") == "_"


def test_safe_name_keeps_the_letters_of_every_script():
    for name in ("фото", "猫", "हिन्दी", "ελιά", "Übung", "가나다"):
        assert safe_name(name) == name
    assert safe_name("U\u0308bung 1/2") == "\u00dcbung_1_2", "as one letter, however it was written"
    assert safe_name("a_-b\u200b\U0001f600\x1b\u202ec") == "a_b_c"


SIGNS = ["100 km/h speed limit", "120 km/h speed limit", *"abcdef"]


@pytest.mark.parametrize(
    ("name", "classes", "label"),
    [
        ("zero-one-two", ["zero", "one", "two"], "zero-one-two"),
        ("apple-aquarium_fish-and-3", ["apple", "aquarium fish", *"abc"], "3: apple, aquarium fish, a ... (5 classes)"),
        ("100_km_h_speed_limit-120_km_h_speed_limit-and-6", SIGNS, "3: 100 km/h speed limit ... (8 classes)"),
        (
            "no_parking_on_sunday-no_stopping",
            ["no parking on sundays", "no stopping"],
            "3: no parking on sundays ... (2 classes)",
        ),
        (
            "red_and_white_circle-stop",
            ["red and white circle 20 kph", "stop"],
            "3: red and white circle 2.. (2 classes)",
        ),
        ("street_scenes_by_night_in_rain", ["ant", "bee"], "3: street_scenes_by_night.."),
        ("a_data_set_without_classes", [], "3: a_data_set_without_cla.."),
        ("", [], '""'),
    ],
)
def test_labels_of_tasks_are_short_and_their_classes_can_be_read(name, classes, label):
    assert task_label(2, name, classes) == label
    assert task_label(2, name, classes, numbered=False) == label.removeprefix("3: ")
