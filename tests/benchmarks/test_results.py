"""Targets, and the command line."""

import subprocess
import sys

from benchmarks import results


def test_targets_say_by_how_much():
  assert results.target("time", 1.1, 1.15)["verdict"] == "met"
  assert results.target("time", 1.38, 1.15)["verdict"] == "missed by 20%"
  assert results.target("speed", 0.55, 1.1, at_least=True)["verdict"] == "missed by 50%"


def test_command_line_refuses():
  command = [sys.executable, "-m", "benchmarks", "layer", "--rounds=0"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2 and "--rounds=0: it must be at least 1" in done.stderr
