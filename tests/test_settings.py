from clmerge.settings import Configured


class _Part(Configured):
    name = "part"

    def __init__(self, share: float = 0.5, sizes: tuple[int, ...] = (1, 2), inner: Configured | None = None):
        self.share = share
        self.sizes = sizes
        self.inner = inner


def test_settings_are_plain_values():
    assert _Part(inner=_Part(0.25)).settings() == {
        "share": 0.5,
        "sizes": [1, 2],
        "inner": {"class_path": "_Part", "init_args": {"share": 0.25, "sizes": [1, 2], "inner": None}},
    }


def test_label_shows_what_differs_and_fits_a_file_name():
    assert _Part().label == "part"
    assert _Part(sizes=(1, 2)).label == "part"
    assert _Part(0.25, (3,), inner=_Part(1e-6)).label == "part_share0.25_sizes-3-_inner-part_share1e-06"


def test_repr_is_the_call():
    assert repr(_Part(0.25)) == "_Part(share=0.25, sizes=(1, 2), inner=None)"
