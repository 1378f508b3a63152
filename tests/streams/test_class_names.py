from clmerge.streams import class_names
from clmerge.streams.class_names import readable


def test_one_name_for_every_class_id():
    sizes = {
        "GTSRB": 43,
        "FLOWERS102": 102,
        "FER2013": 7,
        "PCAM": 2,
        "STL10": 10,
        "EUROSAT": 10,
        "DIGIT_WORDS": 10,
    }
    for name, size in sizes.items():
        assert len(getattr(class_names, name)) == size
        assert len(set(getattr(class_names, name))) == size


def test_names_at_known_ids():
    assert class_names.GTSRB[14] == "stop"
    assert class_names.GTSRB[1] == "red and white circle 30 kph speed limit"
    assert class_names.FLOWERS102[0] == "pink primrose"
    assert class_names.FLOWERS102[-1] == "blackberry lily"
    assert list(class_names.EUROSAT) == sorted(class_names.EUROSAT)


def test_readable():
    assert readable("a__b/c") == "a b c"
