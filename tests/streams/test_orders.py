from typing import get_args

from clmerge.streams.class_incremental import NamedOrder
from clmerge.streams.orders import CLASS_ORDERS, DOMAIN_ORDERS
from clmerge.streams.source_groups import Domains


def test_published_orders_are_permutations_and_begin_as_published():
    assert {name: len(order) for name, order in CLASS_ORDERS.items()} == {
        "magmax_cifar100": 100,
        "magmax_cub200": 200,
        "magmax_imagenet_r": 200,
        "magmax_domainnet": 345,
    }
    for order in CLASS_ORDERS.values():
        assert sorted(order) == list(range(len(order)))
    assert CLASS_ORDERS["magmax_cifar100"][:3] == (70, 89, 11)
    assert CLASS_ORDERS["magmax_cifar100"][-3:] == (12, 85, 32)
    assert CLASS_ORDERS["magmax_cub200"][:3] == CLASS_ORDERS["magmax_imagenet_r"][:3] == (186, 157, 67)
    assert CLASS_ORDERS["magmax_cub200"][-3:] == (189, 2, 27)
    assert CLASS_ORDERS["magmax_domainnet"][:3] == (76, 44, 168)
    assert {name: len(order) for name, order in DOMAIN_ORDERS.items()} == {
        "magmax_domainnet": 6,
        "magmax_imagenet_r": 15,
    }


def test_every_published_order_has_a_name_on_the_command_line():
    assert set(get_args(NamedOrder)) == {"natural", "random", *CLASS_ORDERS}
    assert set(get_args(get_args(Domains)[0])) == set(DOMAIN_ORDERS)
