"""A program that fails shows its last lines and where all of them are."""

from __future__ import annotations

from pathlib import Path

import pytest

from zerosearch.errors import UserError
from zerosearch.stages import Stages


def test_a_stage_that_fails_shows_its_last_lines_and_names_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nfor number in range(40): print('line', number)\nsys.exit(7)\n")
    with pytest.raises(UserError, match=rf"some work failed with exit status 7; .*{tmp_path}/logs/some-work\.log"):
        Stages(tmp_path / "logs", tmp_path).run("some work", script)
    shown = capfd.readouterr().err.split()
    assert "39" in shown and "25" in shown and "24" not in shown
    assert (tmp_path / "logs/some-work.log").read_text().count("line") == 40


def test_a_stage_whose_file_is_there_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, made = tmp_path / "script.py", tmp_path / "made"
    script.write_text(f"open({str(made)!r}, 'a').write('once')")
    stages = Stages(tmp_path / "logs", tmp_path)
    stages.run("work", script, makes=made)
    assert stages.run("work", script, makes=made) == 0.0
    assert made.read_text() == "once" and "work (done before)" in capsys.readouterr().out
