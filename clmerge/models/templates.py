"""Prompt templates of the standard data sets, from which a text head is built.

The strings are those of the CLIP evaluation protocol (arXiv 2103.00020), in the selection that the literature
on task vectors shares (task arithmetic, arXiv 2212.04089; MagMax, arXiv 2407.06322). MagMax uses the 80
ImageNet prompts for CUB-200, ImageNet-R and DomainNet. ``{}`` stands for the class name.
"""

from __future__ import annotations

import difflib
import re

GENERIC = ("a photo of a {}.",)
"""The plain prompt, used for the name "generic"."""

_NUMBER = ('a photo of the number: "{}".',)
_SMALL_OBJECTS = tuple(
    f"{before}{article} {size}{{}}."
    for article in ("a", "the")
    for before, size in (
        ("a photo of ", ""),
        ("a blurry photo of ", ""),
        ("a black and white photo of ", ""),
        ("a low contrast photo of ", ""),
        ("a high contrast photo of ", ""),
        ("a bad photo of ", ""),
        ("a good photo of ", ""),
        ("a photo of ", "small "),
        ("a photo of ", "big "),
    )
)
_FROM_ABOVE = tuple(
    f"{view} {medium} of {article}{{}}."
    for article in ("", "a ", "the ")
    for medium in ("imagery", "photo", "view")
    for view in ("satellite", "aerial")
)

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "generic": GENERIC,
    "Cars": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "CIFAR10": _SMALL_OBJECTS,
    "CIFAR100": _SMALL_OBJECTS,
    "DTD": tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "EuroSAT": tuple(f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")),
    "FER2013": (
        "a photo of a {} looking face.",
        "a photo of a face showing the emotion: {}.",
        "a photo of a face looking {}.",
        "a face that looks {}.",
        "they look {}.",
        "look at how {} they are.",
    ),
    "EMNIST": ('a photo of the digit character: "{}".',),
    "FashionMNIST": ("a photo of a {}.", "a photo of the {}."),
    "Flowers102": ("a photo of a {}, a type of flower.",),
    "Food101": ("a photo of {}, a type of food.",),
    "GTSRB": tuple(f'a {shot} photo of a "{{}}" traffic sign.' for shot in ("zoomed in", "centered", "close up")),
    "KMNIST": ("a photo of the character {}.",),
    "MNIST": _NUMBER,
    "OxfordIIITPet": ("a photo of a {}, a type of pet.",),
    "PCAM": ("this is a photo of {}",),
    "RenderedSST2": ("a {} review of a movie.",),
    "RESISC45": _FROM_ABOVE,
    "SklearnDigits": _NUMBER,
    "STL10": ("a photo of a {}.", "a photo of the {}."),
    "SUN397": ("a photo of a {}.", "a photo of the {}."),
    "SVHN": _NUMBER,
}

# Data sets that use open_clip's 80 ImageNet prompts, which are read on demand.
_LIKE_IMAGENET = ("ImageNet", "CUB200", "ImageNetR", "DomainNet")
_ALIASES = {"stanfordcars": "Cars"}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_NAMES = {_key(name): name for name in (*_TEMPLATES, *_LIKE_IMAGENET)} | _ALIASES


def known_datasets() -> list[str]:
    """Return the names of the data sets with templates."""
    return sorted((*_TEMPLATES, *_LIKE_IMAGENET), key=str.lower)


def has_templates(dataset: str) -> bool:
    """Return whether there are templates for a data set of this name.

    Example:
        >>> has_templates("food-101"), has_templates("holiday photos")
        (True, False)
    """
    return _key(dataset) in _NAMES


def prompt_templates(dataset: str) -> tuple[str, ...]:
    """Return the prompt templates of a data set; ``{}`` stands for the class name.

    Case and punctuation of the name are ignored: ``imagenet-r`` is ``ImageNetR``.

    Args:
        dataset: name of the data set, or "generic" for the plain ``a photo of a {}.``

    Raises:
        ValueError: if the data set is not known; nothing is guessed.

    Example:
        >>> prompt_templates("Food101")
        ('a photo of {}, a type of food.',)
        >>> len(prompt_templates("CIFAR100")), len(prompt_templates("imagenet-r"))
        (18, 80)
    """
    name = _NAMES.get(_key(dataset))
    if name is None:
        near = difflib.get_close_matches(_key(dataset), list(_NAMES), n=3)
        hint = f"the nearest are {[_NAMES[key] for key in near]}" if near else f"known are {known_datasets()}"
        raise ValueError(
            f"expected a data set with prompt templates, got {dataset!r}; {hint}. Set the source's "
            f"templates (--stream.source.templates) to 'generic' for {GENERIC[0]!r}, or to a list of your own"
        )
    if name in _LIKE_IMAGENET:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    return _TEMPLATES[name]


def check_template(template: str) -> str:
    """Return the template unchanged if it holds ``{}`` exactly once.

    Raises:
        ValueError: if it does not.
    """
    if template.count("{}") != 1:
        raise ValueError(f"expected a prompt template with one {{}} for the class name, got {template!r}")
    return template
