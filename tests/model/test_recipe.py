"""Recipes: what is read, and what is refused with the key's name."""

import re

import pytest
import torch
from torch import nn

from commpress.model import Scheduler
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
        ({"prunes": []}, "prunes: unknown key, did you mean 'prune'?"),
        ({"prune": {"start": 1, "amount": 1.5}}, "prune[0].amount: expected less than or equal to 1, got 1.5"),
        (
            {"prune": {"start": 1, "amount": "0.5"}},
            "prune[0].amount: expected a number, got '0.5': write it as a number, without quotes",
        ),
        ({"prune": {"amount": 0.5}}, "prune[0].start: missing"),
        ({"prune": {"start": 1}}, "prune[0]: expected one of amount, threshold, pattern, got none"),
        (
            {"prune": {"start": 1, "amount": 0.5, "threshold": 0.1}},
            "prune[0]: expected one of amount, threshold, pattern",
        ),
        ({"prune": {"start": 5, "end": 2, "amount": 0.5}}, "prune[0].end: expected at least start, 5, got 2"),
        (
            {"prune": {"start": 0, "pattern": "4:2"}},
            "prune[0].pattern: expected fewer kept weights than the group has, as in '2:4', got '4:2'",
        ),
        (
            {"prune": {"start": 0, "end": 9, "pattern": "2:4"}},
            "prune[0].end: expected none, a pattern is applied at once",
        ),
        (
            {"prune": {"start": 0, "amount": 0.5, "schedule": "regrow"}},
            "prune[0].schedule: expected an end after start, 0",
        ),
        (
            {"prune": {"start": 0, "amount": 0.5, "every": 0}},
            "prune[0].every: expected greater than or equal to 1, got 0",
        ),
        ({"prune": [{"start": 0, "amount": 0.5}, {"start": 1.5, "amount": 0.5}]}, "prune[1].start: "),
        ({"quantize": {"bits": 3}}, "quantize[0].bits: expected 4 or 8, got 3"),
        ({"distil": {"temperature": 0}}, "distil.temperature: expected greater than 0, got 0"),
        ({"distil": {"start": 9, "end": 9}}, "distil.end: expected more than start, 9, got 9"),
        (["prune"], "expected tables such as [[prune]]"),
        (
            {"prune": {"start": 2, "amount": 0.5}, "budget": {"max_mb": 1.0, "end": 3}},
            "budget.end: is of what a budget chooses, expected none beside [[prune]] and [[quantize]]",
        ),
        (
            {"prune": {"start": 2, "amount": 0.5}, "quantize": {"start": 1}, "budget": {"max_mb": 1.0, "start": 2}},
            "budget.start: limits are held against the model of that step, expected at most 1, where it is pruned or rounded",
        ),
        (
            {"search": {"layers": {"*": {"bits": [8]}}}, "quantize": {"start": 1}},
            "search.layers: chooses the pruning and rounding, expected no [[prune]] or [[quantize]] with it",
        ),
        (
            {"search": {"layers": {"*": {"bits": [8]}}, "start": 1, "end": 3}, "budget": {"max_mb": 1.0, "end": 3}},
            "budget.end: is of what a budget chooses, expected none beside [[prune]] and [[quantize]]",
        ),
        (
            {"search": {"layers": {"*": {"bits": [8]}}, "start": 1, "end": 3}, "budget": {"max_mb": 1.0, "start": 2}},
            "budget.start: limits are held against the model of that step, expected at most 1, where it is pruned or rounded",
        ),
        ({"search": {"strategy": "nsga2", "together": 1}}, "search.together: a generation of nsga2 has two parents"),
        ({"search": {"layers": {"*": {"bits": [8]}}, "start": 4, "end": 2}}, "search.end: expected at least start, 4"),
    ],
)
def test_what_is_refused(found, told):
    with pytest.raises(RecipeError) as error:
        Recipe.of(found, "r.toml")
    assert str(error.value).startswith(f"r.toml: {told}")


def test_a_search_that_leaves_the_layers_as_they_are_leaves_the_choice_to_the_budget() -> None:
    found = Recipe.of({"search": {"layers": {"*": {"bits": [8, None]}}, "start": 2}, "budget": {"max_mb": 1.0}})
    assert found.after_search(Recipe()).chooses
    assert not found.after_search(Recipe.of({"quantize": {"start": 2}})).chooses


TWICE = """
[[prune]]
start = 0
amount = 0.5
amount = 0.9
"""
PRUNE = "prune:\n  - {start: 0, amount: 0.5}\n"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.toml", "prune = [", "invalid value (at end of document)"),
        ("a.yaml", "prune: [", "line 1, column 9: while parsing a flow node, "),
        ("a.json", "{}", "expected a name that ends in .toml, .yaml or .yml"),
        ("a", "{}", "expected a name that ends in .toml, .yaml or .yml"),
        # nothing is dropped
        ("a.yaml", f"{PRUNE}quantize: []\n{PRUNE}", "prune: the key appears twice, in line 1 and in line 4"),
        (
            "a.yaml",
            "prune:\n - {start: 0, amount: 0.5}\n - start: 1\n   amount: 1.0\n   amount: 0.9\n",
            "prune[1].amount: the key appears twice, in line 4 and in line 5",
        ),
        ("a.yaml", "distil: {hidden: {a: b, 'a': c}}", "distil.hidden.a: the key appears twice, in line 1 and in line 1"),
        ("a.toml", TWICE, "line 5 of [[prune]], 'amount = 0.9': this key or table appears twice"),
        ("a.toml", "[distil]\n[traffic]\n[distil]\n", "line 3, '[distil]': this key or table appears twice"),
        ("a.yaml", f"{PRUNE}---\nquantize: []\n", "line 4: expected one document, got 2"),
        ("a.yaml", "prune:\n", "prune: expected a list, got nothing"),
        ("a.yaml", "[]", "expected tables such as [[prune]], got []"),
        ("a.toml", "", "is empty, expected tables"),
        ("a.yaml", "# nothing\n", "is empty, expected tables"),
        ("a.yaml", "{}\n", "is empty, expected tables"),
        # nothing is guessed
        ("a.toml", "prune = {start = 0, amount = 0.5, parameters = []}", "prune[0].parameters: expected at least one, or"),
        ("a.toml", "quantize = {layers = []}", "quantize[0].layers: expected at least one, or without this key, got []"),
        ("a.yaml", "prune: {start: 0, parameters: 'a.*'}", "prune[0].parameters: expected a list, got 'a.*': write ['a.*']"),
        ("a.yaml", "quantize: {layers: '*'}", "quantize[0].layers: expected a list, got '*': write ['*']"),
        ("a.yaml", "prune: {start: 1, amount: 80%}", "prune[0].amount: expected a number, got '80%': write a share, 0.8"),
        ("a.yaml", "prune: {start: 0500, amount: 0.5}", "prune[0].start: expected a whole number, got '0500'"),
        ("a.yaml", "prune: {start: 1:30, amount: 0.5}", "prune[0].start: expected a whole number, got '1:30'"),
        ("a.yaml", "prune: {start: 1e3, amount: 0.5}", "prune[0].start: expected a whole number, got 1000.0"),
        ("a.yaml", "prune: {start: yes, amount: 0.5}", "prune[0].start: expected a whole number, got True"),
        ("a.yaml", "prune: {start: 1, amount: .nan}", "prune[0].amount: expected a finite number, got nan"),
        ("a.toml", "prune = {start = 1, amount = inf}", "prune[0].amount: expected a finite number, got inf"),
        ("a.toml", f"prune = {{start = {10**20}, amount = 0.5}}", "prune[0].start: expected less than or equal to 1000000000"),
        ("a.toml", f"prune = {{start = {'9' * 5000}, amount = 0.5}}", "line 1, 'prune = {start =': expected a smaller number"),
        ("a.yaml", f"prune: {{start: {'9' * 5000}, amount: 0.5}}", "prune[0].start: expected a whole number, got inf"),
        ("a.toml", "prune = {start = 0, amout = 0.5}", "prune[0].amout: unknown key, did you mean 'amount'?"),
        ("a.toml", "[traffic]\nx = 1", "traffic.x: unknown key, expected one of spec, parameters"),
        ("a.toml", "distil = {prune = {start = 0}}", "distil.prune: unknown key, expected one of start, end, "),
        ("a.yaml", "2024-01-01: 3", "2024-01-01: unknown key"),
        ("a.yaml", "1: 3", "line 1, the file: expected a word as key, got '1'"),
        ("a.yaml", "prune: {? [a] : 1}", "line 1, prune: expected a word as key, got "),
        ("a.yaml", "prune: !!python/object/apply:os.system ['x']", "line 1, prune: expected a plain value, got one with the"),
        ("a.yaml", "prune: [{start: !x 1}]", "line 1, prune[0].start: expected a plain value, got one with the tag '!x'"),
        ("a.yaml", "distil: !!int abc", "line 1, distil: expected a number, got 'abc'"),
        # nothing is taken apart without an end
        ("a.yaml", "prune: &a [*a]", "nested too deep"),
        ("a.yaml", "[" * 5000, "nested too deep"),
        ("a.toml", f"a = {'[' * 5000}", "nested too deep"),
        ("a.yaml", "a: &a [x,x]\n" + "".join(f"{b}: &{b} {[f'*{a}'] * 9}\n".replace("'", "")
            for a, b in zip("abcdefg", "bcdefgh", strict=True)), "at most 100,000 keys and values"),
        # bytes
        ("a.toml", b"[[prune]]\nparameters = ['\xe9*']", "line 2, \"parameters = ['\u00e9*']\": expected a file in UTF-8, got"),
        ("a.yaml", b"distil: {teacher: \xfc}", "line 1, 'distil: {teacher: \u00fc}': expected a file in UTF-8, got"),
        ("a.yaml", "prune: []".encode("utf-16"), "expected a file in UTF-8, got UTF-16"),
        ("a.yaml", b"prune: \x00", "special characters are not allowed"),
        ("a.toml", b"prune = \x00", "line 1, "),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused_by_name_and_key(tmp_path, name, text, told):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / name)
    first = str(error.value).splitlines()[0]
    assert first.startswith(f"{tmp_path / name}: ")
    assert told in first


def test_what_yaml_and_editors_do_to_a_file_does_not_change_it(tmp_path):
    meant = Recipe.of({"prune": {"start": 1000, "pattern": "2:4"}, "quantize": {"activations": "static"}})
    for name, text in (
        ("unquoted.yaml", "prune: {start: 1_000, pattern: 2:4}\nquantize: {activations: static}\n"),
        ("mark.yml", "\ufeffprune: [{start: 1000, pattern: '2:4'}]\r\nquantize: [{activations: 'static'}]\r\n"),
        ("shared.YAML", "prune: [&a {start: 1000, pattern: 2:4}]\nquantize: [{<<: {activations: static}}]\n"),
        ("mark.TOML", "\ufeff[[prune]]\r\nstart = 1000\r\npattern = '2:4'\r\n[quantize]\r\nactivations = 'static'\r\n"),
    ):
        (tmp_path / name).write_bytes(text.encode())
        assert Recipe.load(tmp_path / name) == meant, name


def test_errors_after_reading_name_the_file_as_well(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    late_first = "[[prune]]\nstart = 10\nend = 20\namount = 0.9\n[[prune]]\nstart = 0\nend = 5\namount = 0.5\n"
    for text, told in (
        (
            late_first,
            "prune[1].start: 0, before prune[0] of the same '0.weight', which starts at 10: write the entries in",
        ),
        (
            "[prune]\nstart = 0\namount = 0.5\nparameters = ['no']\n",
            "prune[0].parameters: 'no' matches nothing, known: ",
        ),
        ("[quantize]\nlayers = ['no']\n", "quantize[0]: Quantization(layers=('no',)): 'no' matches no layer"),
    ):
        path = tmp_path / "r.toml"
        path.write_text(text)
        recipe = Recipe.load(path)
        with pytest.raises(RecipeError) as error:
            Scheduler(recipe, model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert str(error.value).startswith(f"{path}: {told}")
    with pytest.raises(RecipeError, match=r"r\.toml: quantize\[0\]\.start: 0, but the run has 0 steps"):
        recipe.require_within(0)


def test_phases_that_a_run_would_not_finish():
    recipe = Recipe.of({"prune": {"start": 1, "end": 30, "amount": 0.5}, "quantize": {"start": 20}})
    recipe.require_within(30)
    with pytest.raises(RecipeError, match=r"prune\[0\].end: 30, but the run has 29 steps"):
        recipe.require_within(29)
    with pytest.raises(RecipeError, match=r"quantize\[0\].start: 20, but the run has 20 steps"):
        Recipe.of({"quantize": {"start": 20}}).require_within(20)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            {"prune": {"start": 1, "amount": 0.5, "regrow": 0.1}},
            "prune[0].regrow: has an effect only with schedule 'regrow'",
        ),
        (
            {"prune": {"start": 1, "pattern": "2:4", "scope": "row"}},
            "prune[0].scope: says what an amount is a share of",
        ),
        (
            {"prune": {"start": 1, "threshold": 0.1, "scope": "local"}},
            "prune[0].scope: says what an amount is a share of",
        ),
        ({"distil": {"weight": 0.0}}, "distil.weight: 0.0, and nothing else uses the teacher"),
        ({"distil": {"hidden_weight": 3.0}}, "distil.hidden_weight: expected hidden with it"),
        ({"distil": {"attention_loss": "kl"}}, "distil.attention_loss: expected attention with it"),
        (
            {"distil": {"weight": 0.0, "temperature": 4.0, "hidden": {"a": "b"}}},
            "distil.temperature: has an effect only on soft",
        ),
    ],
)
def test_a_key_that_would_count_for_nothing_is_refused(found, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        Recipe.of(found)


def test_a_budget_chooses_unless_the_entries_are_there_or_were_chosen():
    entries, budget = {"prune": {"start": 2, "amount": 0.5}}, {"max_mb": 1.0}
    assert Recipe.of({"budget": budget}).chooses
    assert not Recipe.of({"budget": {**budget, "settled": True}}).chooses
    assert not Recipe.of({"budget": budget, **entries}).chooses
    assert not Recipe.of(entries).chooses


def test_a_recipe_behind_its_search_has_what_was_found():
    found = Recipe.of({"search": {"trials": 3}, "budget": {"max_mb": 1.0}, "traffic": {"spec": "int4"}})
    entries = Recipe.of({"quantize": {"start": 2}})
    assert found.after_search().to_dict() == {"budget": {"max_mb": 1.0}, "traffic": {"spec": "int4"}}
    assert found.after_search(entries).quantize == entries.quantize
