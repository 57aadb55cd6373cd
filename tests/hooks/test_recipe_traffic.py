"""[traffic] of a recipe under another library's trainer: it is the spec where the caller gives none, and never ignored."""

from typing import Any

import pytest

import commpress
from commpress.hooks.recipe_traffic import spec_of
from commpress.model import Recipe

RULES = {"*.bias": "none", "*": "int4"}


def recipe(**traffic: Any) -> Recipe:
    return Recipe.of({"traffic": traffic} if traffic else {"quantize": [{"start": 1}]})


@pytest.mark.parametrize(
    ("given", "of", "expected"),
    [
        (None, None, "auto"),
        (None, recipe(), "auto"),
        (None, recipe(spec="int4"), "int4"),
        (None, recipe(spec=RULES), RULES),
        ("int8", recipe(), "int8"),
        ("int8", None, "int8"),
        ("int4", recipe(spec="int4"), "int4"),
        (commpress.parse("int4"), recipe(spec="int4"), commpress.parse("int4")),
        (RULES, recipe(spec=RULES), RULES),
    ],
)
def test_the_spec_is_the_caller_s_else_the_recipe_s_else_found(given: Any, of: Recipe | None, expected: Any) -> None:
    assert spec_of(given, of, "here") == expected


@pytest.mark.parametrize(
    ("given", "traffic", "said"),
    [
        ("int8", {"spec": "int4"}, "here: got 'int8', the recipe has traffic.spec 'int4'; leave one of them out"),
        ("none", {"spec": "int4"}, "here: got 'none', the recipe has traffic.spec 'int4'"),
        (commpress.parse("int8"), {"spec": "int4"}, "here: got 'int8', the recipe has traffic.spec 'int4'"),
        ("int4", {"spec": RULES}, "here: got 'int4', the recipe has traffic.spec {'*.bias': 'none'"),
        (
            None,
            {"parameters": "int8"},
            "here: the recipe has traffic.parameters 'int8', but DistributedDataParallel sends",
        ),
    ],
)
def test_two_that_differ_and_parameters_that_nobody_sends_are_refused(
    given: Any, traffic: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  its text is what is tested
        spec_of(given, recipe(**traffic), "here")
    assert str(error.value).startswith(said)
