"""Recipes: what is read, and what is refused with the key's name."""

import pytest

from commpress.model.recipe import Recipe, RecipeError

TOML = """
[[prune]]
start = 500
end = 3000
amount = 0.8

[[quantize]]
start = 3500
bits = 8

[distil]
teacher = "runs/teacher"
weight = 0.5

[traffic]
spec = "topk(0.01)|int4"
"""
YAML = """
prune:
  - {start: 500, end: 3000, amount: 0.8}
quantize: {start: 3500, bits: 8}
distil: {teacher: runs/teacher, weight: 0.5}
traffic: {spec: topk(0.01)|int4}
"""


def test_toml_and_yaml_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "b.yaml").write_text(YAML)
    one, other = Recipe.load(tmp_path / "a.toml"), Recipe.load(tmp_path / "b.yaml")
    assert one == other
    assert Recipe.of(one.to_dict()) == one
    assert (one.prune[0].how, one.prune[0].last, one.quantize[0].bits) == ("cubic", 3000, 8)
    assert [step for step in range(4000) if one.prune[0].due(step)][::5] == [500, 1000, 1500, 2000, 2500, 3000]


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"prunes": []}, "prunes: unknown key"),
        ({"prune": {"start": 1, "amount": 1.5}}, "prune[0].amount: input should be less than or equal to 1, got 1.5"),
        ({"prune": {"start": 1, "amount": "0.5"}}, "prune[0].amount: input should be a valid number, got '0.5'"),
        ({"prune": {"amount": 0.5}}, "prune[0].start: missing"),
        ({"prune": {"start": 1}}, "prune[0]: expected one of amount, threshold, pattern, got none"),
        (
            {"prune": {"start": 1, "amount": 0.5, "threshold": 0.1}},
            "prune[0]: expected one of amount, threshold, pattern",
        ),
        ({"prune": {"start": 5, "end": 2, "amount": 0.5}}, "prune[0]: end 2: expected at least start, 5"),
        ({"prune": {"start": 0, "pattern": "4:2"}}, "prune[0]: pattern '4:2': expected fewer kept than there are"),
        ({"prune": {"start": 0, "end": 9, "pattern": "2:4"}}, "prune[0]: schedule 'cubic': expected an amount"),
        ({"prune": {"start": 0, "amount": 0.5, "schedule": "regrow"}}, "prune[0]: schedule 'regrow': expected an end"),
        (
            {"prune": {"start": 0, "amount": 0.5, "every": 0}},
            "prune[0].every: input should be greater than or equal to 1",
        ),
        ({"prune": [{"start": 0, "amount": 0.5}, {"start": 1.5, "amount": 0.5}]}, "prune[1].start: "),
        ({"quantize": {"bits": 3}}, "quantize[0].bits: input should be 4 or 8, got 3"),
        ({"distil": {"temperature": 0}}, "distil.temperature: input should be greater than 0, got 0"),
        ({"distil": {"start": 9, "end": 9}}, "distil: end 9: expected more than start, 9"),
        (["prune"], "expected tables such as [[prune]]"),
    ],
)
def test_what_is_refused(found, told):
    with pytest.raises(RecipeError) as error:
        Recipe.of(found, "r.toml")
    assert str(error.value).startswith(f"r.toml: {told}")


def test_files_that_cannot_be_read(tmp_path):
    for name, text, told in (
        ("a.toml", "prune = [", "a.toml: "),
        ("a.yaml", "prune: [", "a.yaml: "),
        ("a.json", "{}", "expected a name that ends in .toml, .yaml or .yml"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(RecipeError) as error:
            Recipe.load(tmp_path / name)
        assert told in str(error.value)


def test_phases_that_a_run_would_not_finish():
    recipe = Recipe.of({"prune": {"start": 1, "end": 30, "amount": 0.5}, "quantize": {"start": 20}})
    recipe.require_within(30)
    with pytest.raises(RecipeError, match=r"prune\[0\].end: 30, but the run has 29 steps"):
        recipe.require_within(29)
    with pytest.raises(RecipeError, match=r"quantize\[0\].start: 20, but the run has 20 steps"):
        Recipe.of({"quantize": {"start": 20}}).require_within(20)
