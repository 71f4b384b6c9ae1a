import json

import pytest

from rbf_jax.sweeps import space

LR, KIND, NORM = "optimizer.learning_rate", "model.attention.kind", "model.attention.qk_norm"
BASE = {LR: 0.1, KIND: "rbf", NORM: False}


def points(given):
    return [[point.values for point in part.points()] for part in space.parse(given)]


def test_a_product_of_zips():
    given = ({LR: (0.1, 0.2)}, {KIND: ("rbf", "dot"), NORM: (False, True)})
    assert points(given) == [
        [
            {LR: 0.1, KIND: "rbf", NORM: False},
            {LR: 0.1, KIND: "dot", NORM: True},
            {LR: 0.2, KIND: "rbf", NORM: False},
            {LR: 0.2, KIND: "dot", NORM: True},
        ]
    ]


def test_an_axis_of_one_value_is_set_but_does_not_vary():
    (part,) = space.parse(({LR: (0.1, 0.2)}, {KIND: ("dot",)}))
    assert [axis.name for axis in part.varying] == ["learning_rate"]
    assert [point.params for point in part.points()] == [
        {"learning_rate": 0.1},
        {"learning_rate": 0.2},
    ]
    assert {point.values[KIND] for point in part.points()} == {"dot"}


def test_a_union_of_parts():
    assert points({"a": ({LR: (0.1,)},), "b": ({KIND: ("rbf", "dot")},)}) == [
        [{LR: 0.1}],
        [{KIND: "rbf"}, {KIND: "dot"}],
    ]


def test_points_of_one_configuration_have_one_identity():
    (first,) = space.parse(({LR: (0.1, 0.2)},))
    (second,) = space.parse(({KIND: ("rbf", "dot")},))
    identities = [[p.identity(BASE) for p in part.points()] for part in (first, second)]
    assert identities[0][0] == identities[1][0]
    assert len({*identities[0], *identities[1]}) == 3


def test_corners_hold_every_value_and_both_ends():
    (part,) = space.parse(
        ({LR: {"low": 0.1, "high": 1.0, "log": True}}, {KIND: ("a", "b", "c")}, {NORM: (True,)})
    )
    corners = [point.values for point in part.corners()]
    assert {corner[LR] for corner in corners} == {0.1, 1.0}
    assert {corner[KIND] for corner in corners} == {"a", "b", "c"}
    assert {corner[NORM] for corner in corners} == {True}


def test_a_space_comes_back_from_json():
    given = {
        "a": ({LR: {"low": 1, "high": 4, "log": False}}, {"data.train_files": (("x",), ("y",))}),
        "b": ({KIND: ("rbf", None), NORM: (False, True)},),
    }
    parts = space.parse(given)
    assert space.parse(json.loads(json.dumps(space.to_plain(parts)))) == parts
    assert parts[0].axes[0].range == space.Range(1, 4, log=False, integer=True)
    assert parts[0].axes[1].choices == ["('x',)", "('y',)"]


def test_choices_are_those_of_all_parts():
    parts = space.parse({"a": ({LR: (0.1, 0.2)},), "b": ({LR: (0.2, 0.3)}, {KIND: ("rbf",)})})
    assert space.all_choices(parts) == {"learning_rate": [0.1, 0.2, 0.3], "kind": ["rbf"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "space is empty"),
        ({}, "space is empty"),
        ({"a": ()}, "space is empty"),
        ("abc", "must be a tuple of axes"),
        ({"a": 3}, "space 'a' is 3; it must be a tuple of axes"),
        (((LR, (1, 2)),), "it must be a dictionary"),
        (({},), "it must be a dictionary"),
        (({LR: 0.1},), "it must be a tuple of values or a range"),
        (({LR: ()},), "it must be a tuple of values or a range"),
        (({LR: (1, 2), KIND: ("a",)},), "learning_rate has 2 values and model.attention.kind 1"),
        (({LR: (1, 2)}, {LR: (3, 4)}), "in two axes"),
        (({LR: (1, 2)}, {"x.learning_rate": (3, 4)}), "two axes that end in learning_rate"),
        (({LR: (1, 1)},), "has the value 1 twice"),
        (({LR: {"low": 1}},), "make ranges with"),
        (({LR: {"low": 1, "high": "2", "log": False}},), "is '2'; it must be a number"),
        (({LR: {"low": 2, "high": 1, "log": False}},), "must go upwards"),
        (({LR: {"low": 0, "high": 1, "log": True}},), "must begin above 0"),
        (({LR: {"low": 1, "high": 2, "log": True}, KIND: ("a",)},), "must be alone"),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match="space") as error:
        space.parse(given)
    assert message in str(error.value)
