"""A real process that holds the lock of a workdir."""

import contextlib
import subprocess
import sys

from tests.support.toys import ROOT

HOLD = """
import pathlib, sys, time
from moe_jax.storage import lock
lock._SILENT = float(sys.argv[2])
with lock.held(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder, silent=30.0, before=""):
  process = subprocess.Popen(
    [sys.executable, "-c", before + HOLD, str(folder), str(silent)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.communicate()
