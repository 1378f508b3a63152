import pytest

from clmerge.models.templates import check_template, known_datasets, prompt_templates

# Numbers of prompts in the CLIP evaluation protocol; STL10 has two there.
COUNTS = {
    "Cars": 8,
    "CIFAR10": 18,
    "CIFAR100": 18,
    "CUB200": 80,
    "DomainNet": 80,
    "DTD": 8,
    "EMNIST": 1,
    "EuroSAT": 3,
    "FashionMNIST": 2,
    "FER2013": 6,
    "Flowers102": 1,
    "Food101": 1,
    "generic": 1,
    "GTSRB": 3,
    "ImageNet": 80,
    "ImageNetR": 80,
    "KMNIST": 1,
    "MNIST": 1,
    "OxfordIIITPet": 1,
    "PCAM": 1,
    "RenderedSST2": 1,
    "RESISC45": 18,
    "SklearnDigits": 1,
    "STL10": 2,
    "SUN397": 2,
    "SVHN": 1,
}


def test_counts_of_the_protocol():
    assert {name: len(prompt_templates(name)) for name in known_datasets()} == COUNTS


def test_every_template_is_usable_and_different():
    for name in COUNTS:
        templates = prompt_templates(name)
        assert len(set(templates)) == len(templates)
        assert [check_template(template) for template in templates] == list(templates)


@pytest.mark.parametrize(
    ("dataset", "template"),
    [
        ("CIFAR100", "a low contrast photo of the {}."),
        ("CIFAR100", "a photo of the big {}."),
        ("CIFAR100", "a photo of a small {}."),
        ("CIFAR100", "a black and white photo of a {}."),
        ("DTD", "a photo of the {} object."),
        ("EuroSAT", "a centered satellite photo of {}."),
        ("EuroSAT", "a centered satellite photo of the {}."),
        ("GTSRB", 'a zoomed in photo of a "{}" traffic sign.'),
        ("GTSRB", 'a close up photo of a "{}" traffic sign.'),
        ("RESISC45", "satellite imagery of {}."),
        ("RESISC45", "aerial view of the {}."),
        ("SVHN", 'a photo of the number: "{}".'),
        ("ImageNetR", "a {} in a video game."),
    ],
)
def test_wording(dataset, template):
    assert template in prompt_templates(dataset)


@pytest.mark.parametrize("alias", ["cifar100", "CIFAR-100", "Cifar_100"])
def test_spelling_of_names_does_not_matter(alias):
    assert prompt_templates(alias) == prompt_templates("CIFAR100")


def test_torchvision_name_of_the_cars():
    assert prompt_templates("StanfordCars") == prompt_templates("Cars")


def test_unknown_data_set_is_never_guessed():
    with pytest.raises(ValueError, match=r"got 'flowers'; the nearest are \['Flowers102'.*'generic'"):
        prompt_templates("flowers")
    with pytest.raises(ValueError, match=r"got 'zzzz'; known are \['Cars'"):
        prompt_templates("zzzz")


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {name}"])
def test_template_needs_one_place_for_the_name(template):
    with pytest.raises(ValueError, match="expected a prompt template with one"):
        check_template(template)
