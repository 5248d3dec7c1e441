"""The line of long work: on a pipe one every so often, on a terminal one in its place."""

import os
import pty
import re
import subprocess
import sys

import pytest

from moe_jax.start import progress
from tests.support.toys import ROOT

WORK = """
import time
from moe_jax.start import progress
progress.SECONDS, progress._SECONDS_ON_TERMINAL = {pace}, {pace}
told = progress.Progress("read", 4e6, "MB")
for done in range(1, 9):
  time.sleep({sleep})
  told.at(done * 0.5e6, "a.txt")
with progress.waiting("compiling"):
  time.sleep(8 * {sleep})
print("done")
"""
LINE = r"read \d\.[05] of 4\.0 MB, a\.txt, \d\.\d MB/s, ETA 0:00:0\d"


@pytest.fixture
def clock(monkeypatch):
  """The seconds of time.monotonic, which a test sets."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def on_terminal(code):
  """All that a process writes to a pseudo-terminal."""
  ours, theirs = pty.openpty()
  with subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs
  ) as run:
    os.close(theirs)
    said = b""
    try:
      while piece := os.read(ours, 4096):
        said += piece
    except OSError:  # how Linux says that the other end is closed
      pass
  os.close(ours)
  assert run.returncode == 0, said
  return said.decode().replace("\r\n", "\n")


def on_pipe(code):
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout == "done\n", done
  return done.stderr.splitlines()


def test_rate_and_time_left(clock, capsys):
  told = progress.Progress("wrote", 1000, "rows")
  told.begin_at(200)
  clock[0] += 9.9
  told.at(300)
  assert not capsys.readouterr().err  # before the first ten seconds
  clock[0] += 10.1
  told.at(300)  # 100 rows in 20 s, and 700 are left
  told.at(900)
  clock[0] += 20
  told.at(600, "b.txt")  # 400 rows in 40 s
  assert capsys.readouterr().err.splitlines() == [
    "wrote 300 of 1,000 rows, 5 rows/s, ETA 0:02:20",
    "wrote 600 of 1,000 rows, b.txt, 10 rows/s, ETA 0:00:40",
  ]
  told = progress.Progress("read", 40e6, "MB")
  clock[0] += 4000
  told.at(10e6)
  assert capsys.readouterr().err == "read 10.0 of 40.0 MB, 0.0 MB/s, ETA 3:20:00\n"


def test_a_pipe_gets_lines_at_the_stated_pace():
  lines = on_pipe(WORK.format(pace=0.2, sleep=0.11))  # a line each second time
  read = [line for line in lines if line.startswith("read ")]
  waits = [line for line in lines if line.startswith("compiling: ")]
  assert lines == read + waits and 2 <= len(read) < 8 and 2 <= len(waits) < 8, lines
  assert re.fullmatch(LINE, read[0]) and "\x1b" not in "".join(lines)


def test_a_terminal_has_one_line_which_is_cleared():
  said = on_terminal(WORK.format(pace=0.2, sleep=0.11))
  *shown, last = said.split("\r\x1b[K")
  assert last == "done\n" and "\n" not in "".join(shown)
  assert shown[0] == "" and re.fullmatch(LINE, shown[1])
  assert any(text.startswith("compiling: 0:00:0") for text in shown)


@pytest.mark.parametrize("where", [on_pipe, on_terminal])
def test_short_work_says_nothing(where):
  assert where(WORK.format(pace=30, sleep=0)) in ([], "done\n")
