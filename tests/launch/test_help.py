"""The help of every command, and flags that it does not list."""

from dataclasses import fields
from pathlib import Path

import pytest
from commands import run_command

from commpress.launch.settings import Settings


@pytest.mark.parametrize(
    "command", ["", "train", "demo", "report", "lab", "explain", "probe", "search", "export", "judge", "shrink"]
)
def test_help_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run_command(*filter(None, [command]), "--help")
    assert (code, err) == (0, "")
    usage, *lines = out.splitlines()
    assert usage.startswith(f"usage: commpress {command}".strip())
    assert max(map(len, lines)) <= 80


def test_the_help_of_train_has_every_setting_once_with_its_default() -> None:
    out = " ".join(run_command("train", "--help").out.replace("│", " ").split())
    for setting in fields(Settings):
        flag = f"--{setting.name.replace('_', '-')} "
        assert out.count(f" {flag}") >= 1, flag
        assert f"(default: {setting.default})" in out, flag
    for panel in ("compression", "parallel", "model", "training", "files"):
        assert out.count(f"{panel} options") == 1


@pytest.mark.parametrize("flag", ["--layer", "--compres", "--warmup-s", "--eval", "--no-resume"])
def test_a_flag_is_never_abbreviated(tmp_path: Path, flag: str) -> None:
    code, _, said = run_command("train", "--steps", 2, "--out", tmp_path / "out", flag, "1")
    assert code == 2
    assert f"Unrecognized options: {flag}" in said
    assert not (tmp_path / "out").exists()


def test_a_flag_without_its_value_is_named() -> None:
    code, _, said = run_command("train", "--layers", "--width", "32")
    assert code == 2
    assert "--layers" in said
