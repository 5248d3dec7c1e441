"""The search's expectations have the known signs, and agree with what is then compiled."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.compilers import FIELDS, GPU, TPU
from tests.support.toys import ROOT

pytestmark = pytest.mark.slow
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}

# The best expected layout whose experts are together, and the best whose experts are apart.
BEST = """
import json, os, sys
from moe_jax.compile.environment import ENVIRONMENT
os.environ.update(ENVIRONMENT)
from moe_jax.compile import expected, targets
from moe_jax.config import Dispatch, override
from moe_jax.start import command_line
name, topology, rows = sys.argv[1:]
config = command_line.load_file(f"configs/published.py:{name}")
config = override(config, {"data.batch_size": int(rows), "model.moe.dispatch": Dispatch.GATHER,
                           "model.moe.capacity_factor": 1.25})
found = expected.ranked(config, targets.parse(topology))
found = [one for one in found if one.config.mesh.tensor == 1]
apart = [one.config.mesh.expert > 1 for one in found]
steps = [one.times.step for one in found]
print(json.dumps([steps[apart.index(False)], steps[apart.index(True)]]))
"""


@pytest.mark.parametrize(
  ("name", "topology", "rows", "apart_wins"),
  [
    # On a TPU's torus fsdp alone wins (marin 6044, MaxText 3857),
    pytest.param("qwen3_30b_a3b", "v5p-128", 64, False, marks=TPU),
    # until a chip would gather too many parameters for its tokens;
    pytest.param("deepseek_v3", "v5p-1024", 512, True, marks=TPU),
    # on NVLink, where rows are cheap to send, the expert axis wins.
    pytest.param("qwen3_30b_a3b", "h200-8", 8, True, marks=GPU),
  ],
)
def test_experts_are_apart_where_they_should_be(name, topology, rows, apart_wins):
  done = subprocess.run(
    [sys.executable, "-c", BEST, name, topology, str(rows)],
    cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  together, apart = json.loads(done.stdout)
  assert (apart < together) == apart_wins, (together, apart)


@pytest.mark.parametrize("topology", [pytest.param("h200", marks=GPU)])
def test_the_command_ranks_compiles_and_draws(topology, tmp_path):
  """A second search reads what the first has compiled."""
  words = [f"--config.{name}={value}" for name, value in FIELDS.items()]
  line = [
    sys.executable,
    "-m",
    "moe_jax.compile",
    "--search",
    f"--topology={topology}",
    "--chips=8",
  ]
  line += ["--config=configs/debug.py", "--compiles=1", f"--out={tmp_path}", *words]
  env = ENV | {"MOE_JAX_CACHE": str(tmp_path / "cache")}
  how = dict(cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
  first = subprocess.run(line, **how)
  assert first.returncode == 0, first.stderr[-2000:]
  assert "compiled, the fastest first" in first.stdout and "the best: bound by" in first.stdout
  assert "traced; compiling" in first.stderr
  assert (tmp_path / "step_time.png").read_bytes()[:4] == b"\x89PNG"
  again = subprocess.run(line, **how)
  assert again.stdout == first.stdout and "traced" not in again.stderr
