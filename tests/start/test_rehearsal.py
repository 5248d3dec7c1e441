"""train.py --rehearse: a toy of every config, and real processes that start, end and go on."""

import contextlib
import dataclasses
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from moe_jax.config import override
from moe_jax.config.fields import flatten
from moe_jax.moe import validation
from moe_jax.start.rehearsal import toy
from tests.support.disks import small_disk
from tests.support.random_configs import draw
from tests.support.scripts import WITHOUT_THREADS, python, refused
from tests.support.toys import ROOT

JOB = ["train.py", "--workdir=gs://no_bucket/run", "--multihost", "--cache_dir=/proc/nowhere"]
DEBUG = [*JOB, "--config=configs/debug.py", "--config.mesh.expert=2", "--rehearse=2"]


def shipped():
  """(file, word, config) of all files and words of configs/."""
  for path in sorted((ROOT / "configs").glob("*.py")):
    module = runpy.run_path(str(path))
    for word in module.get("LAYOUTS") or module.get("MODELS") or [""]:
      yield path.stem, word, module["get_config"](*filter(None, [word]))


def check_toy(config, processes):
  """The toy is valid, splits what the config splits, and fits the processes."""
  small = toy(config, processes)
  validation.validate(small)
  for axis, size in dataclasses.asdict(config.mesh).items():
    assert (getattr(small.mesh, axis) > 1) >= (size > 1), axis
  assert small.mesh.devices // small.mesh.tensor % processes == 0, small.mesh
  return small


def parts(config):
  """What has to be the same in a toy: words and switches, and which sizes are 0."""
  rest = r"data\.|train\.|eval\.|optimizer\.schedule|mesh|.*grouped_matmul|.*\.exchange|.*dense_l"
  return {
    name: value if isinstance(value, str) else min(value, 1)
    for name, value in flatten(config).items()
    if not re.match(rest, name) and name not in ("model.attention", "model.moe.top_k")
  }


def test_every_config_has_a_toy_of_the_same_parts():
  names = set()
  for file, word, config in shipped():
    names.add(file)
    for processes in (2, 3, 4):
      small = check_toy(config, processes)
      assert small.model.num_layers <= 9 and small.data.batch_size <= 24, (file, word)
      assert small.model.moe.num_experts <= 64, (file, word)
      assert parts(small) == parts(config), (file, word)
  assert {"debug", "deepseek_v3", "published"} <= names


def test_a_random_config_has_a_valid_toy():
  def check(config):
    validation.validate(config)
    return config

  for seed in range(40):
    config, _ = draw(np.random.default_rng(seed), check)
    for processes in (2, 3, 6):
      check_toy(config, processes)


def test_kernels_of_a_device_and_patterns_of_layers_have_a_toy():
  base = next(c for file, word, c in shipped() if word == "qwen3_next_80b_a3b")
  fields = {"model.attention": "splash", "model.moe.dispatch": "grouped", "mesh.expert": 64,
            "model.moe.exchange": "ragged", "model.moe.grouped_matmul": "mosaic",
            "model.moe.dense_layers": "0,5,6", "model.moe.first_dense": 4, "mesh.fsdp": 9,
            "mesh.data": 1, "data.batch_size": 576, "model.dim": 2304}  # fmt: skip
  small = check_toy(override(base, fields), 2)
  kinds = (small.model.attention, small.model.moe.grouped_matmul, small.model.moe.exchange)
  assert [kind.value for kind in kinds] == ["auto", "auto", "all_to_all"]
  assert (small.mesh.fsdp, small.mesh.expert, small.model.num_layers) == (3, 2, 9)
  inside = [small.model.moe.in_layer(layer) for layer in range(9)]
  assert inside == [False, False, *[True] * 7]  # one of first_dense, one of dense_layers


@pytest.mark.parametrize("number", ["0", "1", "-2"])
def test_fewer_than_two_processes_are_refused(number):
  line = refused(*DEBUG[:-1], f"--rehearse={number}", imports_jax=False)
  assert f"--rehearse: {number} must be at least 2" in line


@pytest.mark.parametrize("flag", ["--describe", "--diff"])
def test_a_rehearsal_describes_nothing(flag):
  assert f"drop {flag}" in refused(*DEBUG, flag, imports_jax=False)


def test_a_job_without_a_workdir_is_refused():
  assert "--workdir is missing" in refused(*(w for w in DEBUG if "workdir" not in w))


def rehearsed(tmp_path, *command):
  """The end of a rehearsal whose folder of temporary files is tmp_path, which it leaves empty."""
  tmp_path.mkdir(exist_ok=True)
  done = python(*command, env=WITHOUT_THREADS | {"TMPDIR": str(tmp_path)}, timeout=1800)
  assert not list(tmp_path.glob("moe_jax-rehearsal-*"))
  return done


@pytest.mark.slow
@pytest.mark.parametrize(
  "config, mesh, changed",
  [
    (["--config=configs/debug.py", "--config.mesh.expert=2"], "expert 2", "train.steps 30 -> 1000"),
    (["--config=configs/mixtral_8x7b.py:v5p_128"], "fsdp 2 x expert 2", "model.num_layers 32 -> 2"),
  ],
  ids=["debug", "mixtral_8x7b"],
)
def test_a_rehearsal(config, mesh, changed, tmp_path):
  more = ["--init_from=gs://no_bucket/other:7", "--placement=balanced", "--rehearse=2"]
  done = rehearsed(tmp_path, *JOB, *config, *more)
  assert done.returncode == 0, done
  lines = [line for line in done.stdout.splitlines() if re.match(r" *\d+\.\d s  ", line)]
  said = "\n".join(line.split(" s  ")[1] for line in lines)
  pattern = rf"""2 processes meet and share the mesh {mesh}
they train, log, evaluate and save: step 5 validation loss \d.\d+
SIGTERM to process 1: all save step (\d+) and end with 0
the same command goes on from step \1
SIGKILL to process 1: the others end \d+ s later
the same command goes on from step (\d+) to the end, step (\d+)
eval.py --multihost reads step \3: loss \d\.\d+"""
  found = re.fullmatch(pattern, said)
  assert found and int(found[1]) <= int(found[2]) < int(found[3]), said
  for part in (changed, "--workdir=gs://no_bucket/run", config[0], *more[:2]):
    assert part in done.stdout, part


@pytest.mark.slow
def test_what_the_processes_say_is_shown_where_it_fails(tmp_path):
  with small_disk(tmp_path / "disk", "8m") as disk:
    done = rehearsed(disk, *DEBUG)
  assert done.returncode == 1, done
  assert re.search(r"process \d ended with 3:\n  error: .*space", done.stdout), done
  assert done.stderr == "error: --rehearse=2: the processes do not meet\n"


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_processes(number, code, tmp_path):
  env = WITHOUT_THREADS | {"TMPDIR": str(tmp_path)}
  with subprocess.Popen([sys.executable, *DEBUG], cwd=ROOT, env=env) as process:
    children = []
    while len(children) < 2:
      time.sleep(0.1)
      assert process.poll() is None
      with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children()
    os.kill(process.pid, number)
    assert process.wait(60) == code
  assert not any(child.is_running() for child in children)
  assert not list(tmp_path.glob("moe_jax-rehearsal-*"))
