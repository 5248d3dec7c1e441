"""What is built once: by one of two processes, whole or not at all, silently the second time."""

import os
import subprocess
import sys

import pytest

from moe_jax.config import Data
from moe_jax.data import cache, pipeline
from tests.support.texts import error_of
from tests.support.toys import ROOT

_CHILD = """
import sys
from moe_jax.data import pipeline
from moe_jax.config import Data
rows = pipeline.load_rows(Data(), "train")
print(rows.digest, len(rows))
assert "tensorflow" not in sys.modules
"""


def test_two_processes_prepare_at_once_without_tensorflow(stdlib, own_cache):
  command = [sys.executable, "-W", "error", "-c", _CHILD]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  children = [
    subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(2)
  ]
  results = [child.communicate(timeout=120) for child in children]
  assert [child.returncode for child in children] == [0, 0], results
  rows = pipeline.load_rows(stdlib, "train")
  assert [out for out, _ in results] == [f"{rows.digest} {len(rows)}\n"] * 2
  # The work was done once, and these two lines are all that reached the terminal.
  said = "".join(err for _, err in results).splitlines()
  assert sorted(line.split()[0] for line in said) == ["prepared", "tokenized"]
  assert not list(own_cache.glob("*/*.partial"))


def test_a_failed_build_leaves_nothing(tmp_path):
  def fail(folder):
    (folder / "half").write_text("x")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.build_once(tmp_path / "made", fail)
  assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]


def test_second_load_is_silent_and_the_same(stdlib, capfd):
  first = pipeline.load_rows(stdlib, "validation")
  capfd.readouterr()
  second = pipeline.load_rows(stdlib, "validation")
  assert capfd.readouterr() == ("", "")
  assert first.digest == second.digest


def test_cache_that_cannot_be_written(own_cache):
  own_cache.write_text("")
  message = error_of(Data())
  assert f"cannot use the cache {own_cache}" in message and "--cache_dir or $MOE_JAX" in message
