import pytest
from support.bent import bent_classifier


@pytest.fixture(scope="module")
def module():
    return bent_classifier()


@pytest.fixture(scope="module")
def base(module):
    return {name: module.get_parameter(name).detach().clone() for name in module.trained_names}
