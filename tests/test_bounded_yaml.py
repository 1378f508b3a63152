import time

import pytest
import yaml

from clmerge.bounded_yaml import load_yaml, read_yaml


def laughs(depth):
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1",
        "- &x {a: [1, 2.5, yes]}\n- *x\n- <<: *x\n  b: 1",
        "a: &a b\nc: *a",
        "'1': |\n  text\n1: x\n",
        "a: {b: 1, c: [b, b, {b: 1}]}\nb: a\nc: a",
        "- &x {a: 1}\n- &y {b: 1}\n- <<: *x\n  <<: *y\n  a: 2",
        laughs(4),
        "[" * 90 + "]" * 90,
    ],
)
def test_what_is_of_a_bearable_size_is_read(text):
    assert load_yaml(text, "a.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(5), "aliases repeat more than 10,000 nodes"),
        (laughs(40), "aliases repeat more than 10,000 nodes"),
        (f"a: &a {'x' * 10_000}\nb: [{'*a, ' * 200}]", "aliases repeat more than 10,000 nodes"),
        ("a: " + "1:" * 100_000 + "1", "a number of more than 1,000 digits"),
        ("a: &a [*a]", r"the alias \*a stands inside"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ("[" * 100_000, "nested more than 100 deep"),
        ("- " * 100_000, "nested more than 100 deep"),
        ("a: *gone", "undefined alias"),
        ("a: [1", "did not find expected .* at line 2, column 1"),
        ("a: !!python/object/apply:os.system ['touch x']", "could not determine a constructor"),
        ("a: !!bool x", "a value that does not fit its tag"),
        ("a: !!timestamp x", "a value that does not fit its tag"),
        ("a: 1\nb: 2\na: 3", "the key 'a' twice in one mapping, at line 3; keep one"),
        ('- {x: {a: 1, "a": 1}}', "the key 'a' twice in one mapping, at line 1; keep one"),
        ("a\n---\nb", "expected a single document"),
        ("a: \x00", "not allowed"),
    ],
)
def test_what_is_not_is_refused_in_one_line_with_its_name(text, message):
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        load_yaml(text, "a.yaml")
    assert "a.yaml" in str(error.value)
    assert "\n" not in str(error.value)
    assert time.process_time() - started < 5


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\0\0")
    with pytest.raises(ValueError, match=r"a\.yaml: it is no text in UTF-8"):
        read_yaml(tmp_path / "a.yaml")
