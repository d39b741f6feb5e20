"""A user's mistake is one line and exit status 2; a defect of ours keeps its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from zerosearch.command_line import exit_on_user_error
from zerosearch.errors import UserError, user_mistakes


def test_a_users_mistake_is_one_line_on_stderr_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def main() -> None:
        raise UserError("row 3 has no\n  golden answers")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: row 3 has no golden answers\n"


def test_ctrl_c_is_one_line_on_stderr_and_exit_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_arguments_and_result_pass_through() -> None:
    assert exit_on_user_error(lambda left, right: left - right)(3, right=1) == 2


def test_a_defect_of_ours_is_not_dressed_up() -> None:
    @exit_on_user_error
    def main() -> None:
        raise ValueError("defect")

    with pytest.raises(ValueError, match="defect"):
        main()


def test_what_parsing_or_opening_raises_is_the_users() -> None:
    with pytest.raises(UserError, match=r"No such file or directory: '/no/such/file\.yaml'"), user_mistakes():
        Path("/no/such/file.yaml").read_text()
    with pytest.raises(UserError, match="unknown key 'beat'"), user_mistakes():
        raise ValueError("unknown key 'beat'")
