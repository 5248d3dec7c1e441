"""sweep.py as a process with made-up runs: killed, hung up, twice at once, and with no reader."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.fake_runs import Fakes
from tests.support.sweeps import TWO, write_sweep
from tests.support.toys import ROOT

pytestmark = pytest.mark.slow
SECONDS = 600


@pytest.fixture
def folder(tmp_path):
  """A folder in which sweep.py finds made-up runs; they wait at step 5 while `slow` is there."""
  Fakes(tmp_path)
  (tmp_path / "slow").write_text("")
  write_sweep(tmp_path, TWO, seeds=(0,))
  return tmp_path


IN_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # this terminal's signals are now for this process
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(folder, out="out", before=(), **options):
  script = [str(ROOT / "sweep.py"), "--sweep=sweep_file.py", f"--out={out}"]
  command = [sys.executable, *before, *script]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  return subprocess.Popen(command, cwd=folder, text=True, **pipes | options)


def ended(process):
  """Returns its code, output and errors."""
  output, errors = process.communicate(timeout=SECONDS)
  return process.returncode, output, errors


def wait_for_step_5(folder, arm="base", out="out"):
  log, deadline = folder / out / arm / "seed0/log.txt", time.time() + SECONDS
  while not (log.exists() and "step      5/30" in log.read_text()):
    assert time.time() < deadline
    time.sleep(0.05)
  return log


def statuses(folder, out="out"):
  record = json.loads((folder / out / "sweep.json").read_text())
  return {run["arm"]: run["status"] for run in record["runs"]}


# As train.py, which holds the lock of its workdir.
TRAINS = """
import os
sys.path.insert(0, {root!r})
from moe_jax.storage import lock
held = lock.held(workdir)
held.__enter__()
pathlib.Path("pid").write_text(str(os.getpid()))
pathlib.Path("slow").touch()
"""


def test_a_killed_sweep_goes_on_when_its_run_has_ended(folder):
  """While the run lives, a second sweep is refused in one line; a finished run is not repeated."""
  (folder / "base.py").write_text("pathlib.Path('slow').unlink(missing_ok=True)")
  pid = folder / "pid"
  (folder / "none.py").write_text(TRAINS.format(root=str(ROOT)))
  first = start(folder)
  log = wait_for_step_5(folder, "none")
  first.kill()
  first.communicate()
  assert statuses(folder) == {"base": "finished", "none": "running"}
  code, _, errors = ended(start(folder))
  assert code == 5 and errors.count("\n") == 1
  assert (
    f"workdir=out/none/seed0: another training runs there (process {pid.read_text()} on" in errors
  )
  run = psutil.Process(int(pid.read_text()))
  run.kill()
  run.wait(60)
  (folder / "none.py").unlink()
  (folder / "slow").unlink()
  code, output, errors = ended(start(folder))
  assert code == 0 and not errors and "1 of 2 runs were finished before" in output
  assert "resuming at step 5" in log.read_text()
  assert (folder / "out/base/seed0/log.txt").read_text().count("$ python") == 2
  assert set(statuses(folder).values()) == {"finished"}


def test_two_sweeps_at_once(folder):
  """In one folder the second is refused, in another one it works, and the first sees nothing."""
  first = start(folder)
  log = wait_for_step_5(folder)
  second, other = start(folder), start(folder, "other")
  code, _, errors = ended(second)
  assert code == 5 and errors.count("\n") == 1 and "another sweep runs there" in errors
  wait_for_step_5(folder, out="other")
  (folder / "slow").unlink()
  assert ended(first)[0] == ended(other)[0] == 0
  assert set(statuses(folder).values()) == set(statuses(folder, "other").values()) == {"finished"}
  assert log.read_text().count("$ python") == 2


def test_a_terminal_that_is_closed_stops_a_sweep_which_saves(folder):
  ours, theirs = os.openpty()
  process = start(
    folder,
    before=("-c", IN_A_TERMINAL),
    stdin=theirs,
    stdout=theirs,
    stderr=theirs,
    start_new_session=True,
  )
  os.close(theirs)
  log = wait_for_step_5(folder)
  os.close(ours)
  assert process.wait(SECONDS) == 128 + signal.SIGHUP
  assert "SIGTERM: saved step 5" in log.read_text()
  assert statuses(folder) == {"base": "stopped", "none": "waiting"}
  (folder / "slow").unlink()
  assert ended(start(folder))[0] == 0 and "resuming at step 5" in log.read_text()


def test_a_sweep_goes_on_without_a_reader(folder):
  """As after `sweep.py ... | head`."""
  process = start(folder)
  wait_for_step_5(folder)
  process.stdout.close()
  (folder / "slow").unlink()
  assert process.wait(SECONDS) == 0 and process.stderr.read() == ""
  process.stderr.close()
  assert set(statuses(folder).values()) == {"finished"}
