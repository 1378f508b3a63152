import random
import re
import time

import pytest

from clmerge.checkpoints.patterns import BoundedPattern


def made_up_pattern(rng, depth=0):
    choice = rng.random()
    if depth > 3 or choice < 0.45:
        return rng.choice(["a", "b", "[ab]", "[^a]", ".", r"\d", r"\w", r"\W", "^", "$", r"\b", "[a-c1]", r"\."])
    if choice < 0.6:
        return made_up_pattern(rng, depth + 1) + made_up_pattern(rng, depth + 1)
    if choice < 0.75:
        return f"({made_up_pattern(rng, depth + 1)}|{made_up_pattern(rng, depth + 1)})"
    repeat = rng.choice(["*", "+", "?", "{2}", "{1,3}", "*?", "{2,}"])
    return f"(?:{made_up_pattern(rng, depth + 1)}){repeat}"


def test_what_pythons_matcher_matches():
    rng = random.Random(0)
    compared = 0
    for _ in range(1500):
        pattern = made_up_pattern(rng)
        try:
            found = BoundedPattern(pattern)
        except ValueError:
            continue  # nested too deeply
        for _ in range(4):
            text = "".join(rng.choice("ab1.c\n") for _ in range(rng.randrange(7)))
            assert found.matches(text) == (re.fullmatch(pattern, text) is not None), (pattern, text)
            compared += 1
    assert compared > 4000


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "((a*)*)*b", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)b", "(a{0,500}){0,500}b"]
)
def test_patterns_that_backtrack_without_end(pattern):
    started = time.process_time()
    assert not BoundedPattern(pattern).matches("a" * 200)
    assert BoundedPattern(pattern).matches("a" * 200 + "b")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "[", "*", "(?P<x", "\\", "a{99999999999}", "(?=a)", "(?<!a)b", r"(a)\1", "(?i)a", "(?i:a)", "(?>a)"),
        *("a*+", "(" * 60 + ")" * 60, "(" * 5000, "((((a*)*)*)*)*"),
    ],
)
def test_what_is_refused(pattern):
    with pytest.raises(ValueError, match="regular expression"):
        BoundedPattern(pattern)
