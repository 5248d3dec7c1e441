"""A train step compiles for an H200, with cuDNN's flash attention and no array of queries by keys.

XLA compiles for a described GPU, so this needs none, nor a driver. It says nothing of run time, nor
whether cuDNN has an engine for these sizes: it looks for one on the device.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.support.compilers import GPU
from tests.support.toys import ROOT
from tests.support.train_step_case import square_arrays

WORKER = ROOT / "tests/support/gpu_compile_worker.py"

pytestmark = [pytest.mark.slow, *GPU]


def compile_for_h200(attention, tmp_path):
  out = tmp_path / "step.hlo"
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, WORKER, attention, out]
  subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=600)
  return out.read_text()


def test_train_step_has_flash_attention(tmp_path):
  hlo = compile_for_h200("cudnn", tmp_path)
  kernels = re.findall(r'custom_call_target="(__cudnn\$\w+)"', hlo)
  # The forward pass once; XLA takes a layer's backward pass out of the loop over both.
  assert kernels.count("__cudnn$fmhaSoftmax") == 1
  assert 1 <= kernels.count("__cudnn$fmhaSoftmaxBackward") == len(kernels) - 1 <= 2
  assert not square_arrays(hlo)


def test_train_step_with_the_reference_has_scores_in_memory(tmp_path):
  """So the search for them finds them."""
  hlo = compile_for_h200("reference", tmp_path)
  assert "__cudnn$fmha" not in hlo
  assert square_arrays(hlo)
