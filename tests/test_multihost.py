"""Two real processes train, evaluate and generate as one does, and end together."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.errors import UserError
from moe_jax.training import health
from tests.support.processes import (
  Together,
  alone,
  assert_equal_values,
  numbers,
  train_command,
)
from tests.support.scripts import Run, built, call
from tests.support.toys import ROOT

LONG = [f"--config.train.{name}=100000" for name in ("steps", "eval_every", "checkpoint_every")]


@pytest.fixture(scope="module")
def one(shared_folder, cache):
  """A run of one process with two devices."""

  def run(path):
    command = train_command(path / "run", cache, "--config.train.steps=6")
    subprocess.run(command, cwd=ROOT, env=alone(2), check=True)
    return {}

  return Run(built(shared_folder / "multihost_one", run).path / "run", "")


@pytest.mark.slow
def test_two_processes_train_as_one(one, tmp_path, cache):
  with Together(train_command(tmp_path / "two", cache, "--config.train.steps=6")) as two:
    (code, output, _), (other_code, other_output, _) = two.ends()
  assert code == other_code == 0
  assert "step      6/6" in output and not other_output
  assert_equal_values(numbers(tmp_path / "two"), numbers(one.workdir))


@pytest.mark.slow
def test_two_processes_share_every_sequence(tmp_path, cache):
  """Each holds a part of all sequences and reads all rows, and both train as one device does."""
  parts = ["--config.mesh.expert=1", "--config.mesh.context=2"]
  same = ["--config.train.steps=6", "--config.model.moe.group_size=16"]
  command = train_command(tmp_path / "one", cache, *same, "--config.mesh.expert=1")
  subprocess.run(command, cwd=ROOT, env=alone(1), check=True)
  with Together(train_command(tmp_path / "two", cache, *same, *parts)) as two:
    ends = two.ends()
  assert [end[0] for end in ends] == [0, 0], ends
  assert_equal_values(numbers(tmp_path / "two"), numbers(tmp_path / "one"))


@pytest.mark.slow
def test_two_processes_evaluate_as_one(one, tmp_path):
  """Sums over documents and the traced routing, too, whose rows are on both processes."""
  options = ["--documents=3", "--routing", "--capacity_factors=0.5", "--causal"]
  results, outputs = [], []
  for name in ("alone", "together"):
    workdir = tmp_path / name / "run"
    shutil.copytree(one.workdir, workdir)
    command = [sys.executable, "eval.py", f"--workdir={workdir}", *options]
    if name == "alone":
      done = subprocess.run(
        command, cwd=ROOT, env=alone(2), check=True, capture_output=True, text=True
      )
      outputs.append(done.stdout)
    else:
      with Together(command) as two:
        (code, output, _), (other_code, other_output, _) = two.ends()
      assert code == other_code == 0 and not other_output
      outputs.append(output)
    results.append([json.loads((workdir / f"{x}.json").read_text()) for x in ("eval", "routing")])
  assert_equal_values(results[1], results[0])
  assert len(results[0][0]["largest_documents"]) == 3
  other = ("plots", "causal evaluation")  # a path, and what the clock makes
  same = [[x for x in text.splitlines() if not x.startswith(other)] for text in outputs]
  assert same[0] == same[1]


@pytest.mark.slow
def test_two_processes_generate_the_text_of_one(one):
  command = [sys.executable, "generate.py", f"--workdir={one.workdir}", "--prompt=def ",
             "--max_new_tokens=40", "--num_samples=2", "--prompt=class A"]  # fmt: skip
  text = call(*command[1:]).stdout
  with Together(command) as two:
    ends = two.ends()
  assert [end[:2] for end in ends] == [(0, text), (0, "")]


@pytest.mark.slow
@pytest.mark.parametrize(
  "lost, number", [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_lost_process_ends_the_other(lost, number, tmp_path, cache):
  """By jax, with SIGABRT: a shell and a scheduler see 134. At once where process 0 is gone."""
  with Together(train_command(tmp_path / "run", cache, *LONG, "--heartbeat_timeout=10")) as two:
    two.until("step      3/")
    start = time.monotonic()
    code, stderr = two.lose(lost, number)
  assert code == -signal.SIGABRT and "another task died" in stderr
  assert time.monotonic() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_mistake_on_one_host_ends_the_other(number, tmp_path):
  caches = [{"MOE_JAX_CACHE": str(tmp_path)}, {"MOE_JAX_CACHE": "/proc/nowhere"}]
  command = [x for x in train_command(tmp_path / "run", "") if "cache_dir" not in x]
  with Together([*command, "--heartbeat_timeout=10"], caches[:: 1 - 2 * number]) as two:
    ends = two.ends()
  own, other = ends[1 - number], ends[number]
  assert own[0] == 2 and "cannot use the cache /proc/nowhere" in own[2][0]
  assert other[0] == -signal.SIGABRT


@pytest.mark.slow
def test_a_process_that_never_starts_ends_the_other(tmp_path, cache):
  """Here, because of a mistake in its flags, which is told before the processes meet."""
  command = train_command(tmp_path / "run", cache, "--heartbeat_timeout=5")
  with Together(command, each=([], ["--replay=-1"])) as two:
    (code, _, _), (own_code, _, (line,)) = two.ends()
  assert code == -signal.SIGABRT and own_code == 2 and "replay" in line


@pytest.mark.slow
def test_other_arguments_are_refused_by_both(tmp_path, cache):
  command = train_command(tmp_path / "run", cache)
  each = (["--config.train.seed=1"], [f"--cache_dir={tmp_path}", "--config.train.seed=2"])
  with Together(command, each=each) as two:
    ends = two.ends()
  line = "error: --multihost: process 1 was started with other arguments than process 0; start the"
  assert [end[0] for end in ends] == [2, 2]
  assert all(end[2] == [line + " same command on all hosts"] for end in ends)


@pytest.mark.slow
def test_an_exception_of_one_process_ends_both(tmp_path):
  worker = [sys.executable, "-m", "tests.support.refusal_worker", str(tmp_path), "--bug"]
  with Together(worker) as two:
    processes = two.processes
    assert processes[1].wait(timeout=600) == 1 and processes[0].wait(timeout=600) == -signal.SIGABRT
    assert "ZeroDivisionError: integer division" in processes[1].stderr.read()


@pytest.mark.slow
def test_what_both_refuse_and_an_alarm_are_the_same_lines_of_both(one, tmp_path):
  """Along a tensor axis over processes, each would feed other sequences, where the same belong."""
  shutil.copytree(one.workdir, tmp_path / "odd")
  path = tmp_path / "odd/config.json"
  config = json.loads(path.read_text())
  del config["digest"]
  config["mesh"]["expert"] = 1
  config["model"]["moe"]["group_size"] = config["data"]["seq_len"] * config["data"]["batch_size"]
  path.write_text(json.dumps(config))
  with Together([sys.executable, "-m", "tests.support.refusal_worker", str(tmp_path)]) as two:
    (code, _, lines), (other_code, _, other_lines) = two.ends()
  assert code == other_code == health.StopAlarm.code and lines == other_lines
  tensor, split, alarm = lines
  assert "config.mesh.tensor=2: every process feeds sequences of its own" in tensor
  assert "a batch of 1 parts does not split over 2 processes" in split
  assert "of the assignments are dropped" in alarm


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_both(tmp_path, cache):
  with Together(train_command(tmp_path / "run", cache, *LONG)) as two:
    two.until("step      3/")
    two.processes[1].send_signal(signal.SIGTERM)
    (code, output, _), (other_code, _, _) = two.ends()
  assert code == other_code == 0
  (step,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
  assert f"saved step {step}; the same command resumes the run there" in output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_both_without_saving(tmp_path, cache):
  with Together(train_command(tmp_path / "run", cache, *LONG, "--heartbeat_timeout=10")) as two:
    two.until("step      3/")
    two.processes[1].send_signal(signal.SIGINT)
    while not two.processes[1].stderr.readline().startswith("stopping after this step"):
      pass
    two.processes[1].send_signal(signal.SIGINT)
    (code, _, _), (own_code, _, _) = two.ends()
  assert code == -signal.SIGABRT and own_code == 130


def test_every_sequence_is_of_one_process():
  within = np.arange(8).reshape(2, 2, 1, 1, 2) // 4
  sharding.check_processes(within)  # two processes of four devices, tensor inside of each
  sharding.check_processes(within[::-1])  # in another order, as on a TPU's torus
  with pytest.raises(UserError, match="divides the 4 device"):
    sharding.check_processes(np.arange(8).reshape(2, 2, 1, 1, 2) % 2)


def test_processes_share_sequences_whole():
  """Parts of a sequence may be of several processes, where those have all sequences in common."""
  parts = np.arange(8).reshape(2, 1, 1, 4, 1)
  sharding.check_processes(parts // 2)  # two processes for each sequence
  sharding.check_processes(parts // 4)
  with pytest.raises(UserError, match=r"config\.mesh\.context=4"):
    sharding.check_processes(parts // 3)
