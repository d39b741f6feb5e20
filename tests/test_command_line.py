"""Flags and YAML go through the same checks, and each mistake is one sentence."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Literal

import pytest

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.errors import UserError


@dataclass
class Options:
    steps: int = field(default=3, metadata={"min": 1, "help": "How many."})
    rate: float = field(default=0.5, metadata={"above": 0, "max": 1})
    kind: Literal["full", "lora"] = "full"
    names: list[str] = field(default_factory=lambda: ["nq"])
    merge: bool = False
    limit: int | None = field(default=None, metadata={"min": 1})

    def __post_init__(self) -> None:
        if self.merge and self.kind == "full":
            raise ValueError("merge needs lora")


def config(folder: Path, text: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_defaults_then_yaml_then_flags(tmp_path: Path) -> None:
    assert parse(Options, argv=[]) == (Options(),)
    flags = config(tmp_path, "steps: 5\nrate: 1e-3\nkind: lora\nnames: [a, b]\nmerge: true\nlimit: 4\n")
    assert parse(Options, argv=flags) == (Options(5, 0.001, "lora", ["a", "b"], True, 4),)
    (options,) = parse(Options, argv=[*flags, "--steps", "7", "--names", "c", "--merge", "false"])
    assert (options.steps, options.names, options.merge, options.kind) == (7, ["c"], False, "lora")


def test_a_date_within_a_mapping_of_yaml_is_its_text(tmp_path: Path) -> None:
    @dataclass
    class Template:
        kwargs: str | None = None

    (template,) = parse(Template, argv=config(tmp_path, "kwargs: {date_string: 2024-07-26}\n"))
    assert template.kwargs == '{"date_string": "2024-07-26"}'


def test_yaml_may_give_one_value_for_a_list_and_null_for_none(tmp_path: Path) -> None:
    (options,) = parse(Options, argv=config(tmp_path, "names: one\nlimit: null\n"))
    assert (options.names, options.limit) == (["one"], None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "2.5", "argument --steps: invalid int value: '2.5'; --help lists all flags"),
        ("steps", "0", "steps is 0: it must be at least 1"),
        ("limit", "-1", "limit is -1: it must be at least 1"),
        ("rate", "0", "rate is 0.0: it must be above 0"),
        ("rate", "1.5", "rate is 1.5: it must be at most 1"),
        ("rate", "nan", "rate is nan: it must be a number"),
        ("kind", "half", "argument --kind: invalid choice: 'half' (choose from"),
        ("merge", "true", "merge needs lora"),
    ],
)
def test_a_wrong_value_is_refused_in_a_flag_and_in_yaml_alike(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    for argv in ([f"--{name}={value}"], config(tmp_path, f"{name}: {value}\n")):
        with pytest.raises(UserError) as refused:
            parse(Options, argv=argv)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "1"], "unknown flag --step; is it steps?; --help lists all flags"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", "no/such.yaml"], "there is no config file no/such.yaml"),
        (["--config", "a.yaml", "--config", "a.yaml"], "--config stands twice"),
    ],
)
def test_wrong_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse(Options, argv=argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 1", r"config.yaml names 'stepz', which is unknown; is it steps\?"),
        ("env: {LD_PRELOAD: x.so}", "config.yaml names 'env', which is unknown"),
        ("- steps", "must hold names with values, a YAML mapping"),
        ("steps: [1", "expected ',' or ']'"),
        ("steps: null", "config.yaml gives steps no value: leave it out for the default"),
        ("steps: 1\nsteps: 2", "config.yaml gives steps twice"),
        ("kind:", "config.yaml gives kind no value"),
        ("steps: " + "[" * 5000, "recursion"),
        ("steps: [1, 2]", r"config.yaml gives steps a list, \[1, 2\]: it takes one value"),
    ],
)
def test_wrong_config_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(Options, argv=config(tmp_path, text))


def test_what_is_said_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2J\u202e\nb")
    assert capsys.readouterr().out == "a\\x1b[2J\\u202e\nb\n"


def test_what_the_terminals_encoding_lacks_is_shown_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    @exit_on_user_error
    def main() -> None:
        say("caf\xe9 \u65e5")
        raise UserError("\u65e5")

    streams = [TextIOWrapper(BytesIO(), encoding="latin-1", newline="\n") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit):
        main()
    assert [stream.detach().getvalue() for stream in streams] == [b"caf\xe9 \\u65e5\n", b"error: \\u65e5\n"]


def test_flags_for_another_program_are_returned() -> None:
    assert parse(Options, argv=["--steps", "2", "--max-num-seqs", "4"], rest=True) == (
        Options(steps=2),
        ["--max-num-seqs", "4"],
    )
