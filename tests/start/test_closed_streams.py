"""What a program prints where a terminal cannot show it, a stream is closed."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.scripts import python
from tests.support.toys import ROOT

_PRINTS_TEXT = r"""
import os, sys
from moe_jax.start import command_line
from moe_jax.errors import UserError

def main():
  print(sys.argv[1])
  with open(os.devnull) as file:  # takes no number of a closed stream
    assert file.fileno() > 2
  print("to stderr", file=sys.stderr)
  raise UserError("no \x1b[31m \udcff\n\n \u65e5")

command_line.one_line_errors(main)
"""


def prints_text(argument, how="", **variables):
  command = f"{sys.executable} -c '{_PRINTS_TEXT}' '{argument}' {how}"
  env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
  return subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True)


def test_an_error_prints_what_a_terminal_would_not():
  done = prints_text("x")
  assert done.returncode == 2
  assert done.stderr == "to stderr\nerror: no \\x1b[31m \\udcff \u65e5\n".encode()


_LIBRARY_GOES_ON = """
import atexit, sys, threading
from moe_jax.start import command_line
from moe_jax.errors import StorageError

def main():
  threading.Thread(target=threading.Event().wait, args=(300,)).start()
  atexit.register(print, "Traceback", file=sys.stderr)
  print("saved", end="")
  raise StorageError("full")

command_line.one_line_errors(main)
"""


def test_nothing_follows_the_line_that_ends_a_program_and_no_thread_is_waited_for():
  done = python("-c", _LIBRARY_GOES_ON, timeout=60)
  assert (done.returncode, done.stdout, done.stderr) == (3, "saved", "error: full\n")


def test_text_that_a_terminal_cannot_show_is_spelled():
  done = prints_text("\u65e5", PYTHONIOENCODING="latin-1", PYTHONUTF8="1")
  assert done.returncode == 2 and done.stdout == b"\\u65e5\n"


@pytest.mark.parametrize(("how", "out"), [("2>&-", b"x\n"), (">&-", b""), ("<&-", b"x\n")])
def test_closed_streams_take_no_number_of_a_file(how, out):
  """What libraries print on stderr would be written into the file that has its number."""
  done = prints_text("x", how)
  assert (done.returncode, done.stdout) == (2, out)
  assert b"to stderr" in done.stderr or how == "2>&-"


def test_a_reader_that_closes_the_output_ends_the_program_without_a_traceback():
  command = f"{sys.executable} train.py --help | head -1; exit ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.startswith("Trains a model") and not done.stderr
  assert done.returncode in (0, 128 + signal.SIGPIPE)  # 0: all was written before `head` ended
