"""Targets, and the command line."""

import json
import re
import subprocess
import sys

from benchmarks import results


def test_targets_say_by_how_much():
  assert results.target("time", 1.1, 1.15)["verdict"] == "met"
  assert results.target("time", 1.38, 1.15)["verdict"] == "missed by 20%"
  assert results.target("speed", 0.55, 1.1, at_least=True)["verdict"] == "missed by 50%"
  assert results.target("wrong kernels", 0.0, 0.0)["verdict"] == "met"
  assert results.target("wrong kernels", 1.0, 0.0)["verdict"] == "missed"


def test_command_line_refuses():
  command = [sys.executable, "-m", "benchmarks", "layer", "--rounds=0"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2 and "--rounds=0: it must be at least 1" in done.stderr


def write(path, **measured):
  targets = [results.target(what, value, 1.0, at_least=True) for what, value in measured.items()]
  environment = {"commit": path.stem, "device": "a", "cpus": 2, "jax": "1"}
  path.write_text(json.dumps({"environment": environment, "train": {"targets": targets}}))
  return str(path)


def compare(*paths):
  command = [sys.executable, "benchmarks/compare.py", *paths]
  return subprocess.run(command, capture_output=True, text=True, cwd=results.ROOT)


def test_two_results_are_compared(tmp_path):
  old = write(tmp_path / "old.json", speed=1.2, share=0.5, gone=1.0)
  new = write(tmp_path / "new.json", speed=0.6, share=0.6)
  done = compare(old, new)
  assert done.returncode == 1, done.stderr
  assert re.search(r"speed +1\.20 +0\.60 +0\.50 +>= 1\.00 +met -> missed by 40%", done.stdout)
  assert re.search(r"share +0\.50 +0\.60 +1\.20 +>= 1\.00 +missed by 40%", done.stdout)
  assert f"only in {old}: gone" in done.stdout and "commit   old -> new" in done.stdout
  assert done.stdout.endswith("met 0 of 2 aims\n")
  assert compare(new, new).returncode == 0


def test_what_is_no_result_is_one_line(tmp_path):
  (tmp_path / "list.json").write_text("[]")
  for path in (tmp_path / "none.json", tmp_path / "list.json"):
    done = compare(str(path), str(path))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {path}"), done.stderr
