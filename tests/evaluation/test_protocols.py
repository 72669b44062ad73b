"""Which numbers may stand side by side: each key of a protocol, changed alone."""

import copy

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation.protocols import (
    check_same_protocol,
    differing_keys,
    flat_protocol,
    protocol_differences,
    protocol_id,
)
from vla_bench.evaluation.rollout import EvaluationSettings, fingerprint


class Nobody:
    fingerprint = "nobody"


IDENTITY = fingerprint(Nobody, PointReach(), EvaluationSettings("point"))
KEYS = list(flat_protocol(IDENTITY))


def changed(key, value="another"):
    found = copy.deepcopy(IDENTITY)
    *above, last = key.split(".")
    place = found
    for name in above:
        place = place[name]
    place[last] = value
    return found


@pytest.mark.parametrize("key", KEYS)
def test_every_key_alone_keeps_two_numbers_apart_and_is_named(key):
    other = changed(key)
    assert list(protocol_differences(IDENTITY, other)) == [key]
    assert protocol_id(other) != protocol_id(IDENTITY)
    with pytest.raises(ValueError, match=f"not the same protocol.*: {key} is .* of A and 'another' of B$"):
        check_same_protocol(IDENTITY, other)
    check_same_protocol(IDENTITY, other, allowed=[key])
    assert differing_keys([IDENTITY, other]) == {key: [flat_protocol(IDENTITY)[key], "another"]}


def test_the_keys_of_an_evaluation():
    assert {"protocol.max_steps", "benchmark.version.vla_bench", "benchmark.image_size"} <= set(KEYS)
    assert not any(key.startswith("policy") for key in KEYS)


def test_the_policy_is_no_part_of_the_protocol():
    check_same_protocol(IDENTITY, {**IDENTITY, "policy": "somebody"})
    assert protocol_id({**IDENTITY, "policy": "somebody"}) == protocol_id(IDENTITY)


def test_the_order_of_keys_is_no_difference():
    turned = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in IDENTITY.items()
    }
    assert protocol_id(dict(reversed(turned.items()))) == protocol_id(IDENTITY)


def test_a_key_that_one_side_lacks_is_a_difference_even_of_none():
    known = changed("protocol.renderer", None)
    assert protocol_differences(IDENTITY, known, ("x", "y")) == {
        "protocol.renderer": "protocol.renderer is missing of x and None of y"
    }
    assert protocol_differences(known, IDENTITY) != {}


def test_what_is_allowed_is_a_key_or_all_below_it():
    other = changed("benchmark.version.vla_bench")
    for allowed in ("benchmark", "benchmark.version", "benchmark.version.vla_bench"):
        check_same_protocol(IDENTITY, other, allowed=[allowed])
    with pytest.raises(ValueError, match="benchmark.version.vla_bench is"):
        check_same_protocol(IDENTITY, other, allowed=["benchmark.name", "protocol"])


def test_an_unknown_key_is_not_allowed_in_silence():
    with pytest.raises(ValueError, match="no protocol has a key 'benchmark.vers'.*did you mean"):
        check_same_protocol(IDENTITY, IDENTITY, allowed=["benchmark.vers"])


def test_all_differing_keys_stand_in_one_line():
    other = changed("protocol.max_steps", 7)
    other["benchmark"]["name"] = "plane"
    with pytest.raises(ValueError) as refused:
        check_same_protocol(IDENTITY, other, ("oft", "pi0"))
    assert "protocol.max_steps is 40 of oft and 7 of pi0" in str(refused.value)
    assert "benchmark.name is 'point' of oft and 'plane' of pi0" in str(refused.value)
    assert "\n" not in str(refused.value)
