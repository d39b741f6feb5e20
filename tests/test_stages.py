"""A program that fails shows its last lines and where all of them are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from searching import wait_until

from zerosearch.errors import UserError
from zerosearch.stages import Stages


def test_a_stage_that_fails_shows_its_last_lines_and_names_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    lines = "sys.stdout.buffer.write(b'caf\\xe9\\n')\nfor number in range(40): print('line', number)"
    script.write_text(f"import sys\n{lines}\nsys.exit(7)\n")
    with pytest.raises(UserError, match=rf"some work failed with exit status 7; .*{tmp_path}/logs/some-work\.log"):
        Stages(tmp_path / "logs", tmp_path).run("some work", script)
    shown = capfd.readouterr().err.split()
    assert "39" in shown and "25" in shown and "24" not in shown
    log = (tmp_path / "logs/some-work.log").read_text()
    assert log.startswith("caf\ufffd\n") and log.count("line") == 40


def test_a_stage_whose_file_is_there_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, made = tmp_path / "script.py", tmp_path / "made"
    script.write_text(f"open({str(made)!r}, 'a').write('once')")
    stages = Stages(tmp_path / "logs", tmp_path)
    stages.run("work", script, makes=made)
    assert stages.run("work", script, makes=made) == 0.0
    assert made.read_text() == "once" and "work (done before)" in capsys.readouterr().out


# As the demo: one stage in a thread, one in the main thread. Each starts a process of its own, as launchers do.
TWO_STAGES = """\
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zerosearch.simulator.server import exit_on_signals
from zerosearch.stages import Stages

exit_on_signals()
folder = Path(sys.argv[1])
stages = Stages(folder / "logs", folder)
with ThreadPoolExecutor(1) as meanwhile, stages:
    meanwhile.submit(stages.run, "first", "launch.py", "1")
    stages.run("second", "launch.py", "2")
"""
LAUNCH = """\
import subprocess, sys
from pathlib import Path
child = subprocess.Popen(["sleep", "300"])
Path(f"pid-{sys.argv[1]}").write_text(str(child.pid))
child.wait()
"""


def test_a_signal_leaves_no_stage_and_nothing_that_a_stage_started(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text(LAUNCH)
    (tmp_path / "two.py").write_text(TWO_STAGES)
    with subprocess.Popen([sys.executable, str(tmp_path / "two.py"), str(tmp_path)]) as command:
        paths = [tmp_path / "pid-1", tmp_path / "pid-2"]
        wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 128 + signal.SIGTERM
    wait_until(lambda: not any(is_running(int(path.read_text())) for path in paths))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
