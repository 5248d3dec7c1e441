"""Two real processes train, evaluate and generate as one does, and end together."""

import json
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import sharding
from moe_jax.errors import UserError
from moe_jax.training import health
from tests.support.processes import Together, alone, train_command
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


def numbers(workdir):
  """{name: values of all lines} of metrics.jsonl, without those that the clock makes."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  names = {name for line in lines for name in line if not name.endswith(("_s", "seconds", "mfu"))}
  return {name: [line[name] for line in lines if name in line] for name in names}


def assert_equal_values(got, want):
  """Floats may differ by rounding: sums over two devices, in a process or over a network."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert a == b or a == pytest.approx(b, rel=1e-5, abs=1e-6), path


@pytest.mark.slow
def test_two_processes_train_as_one(one, tmp_path, cache):
  with Together(train_command(tmp_path / "two", cache, "--config.train.steps=6")) as two:
    (code, output, _), (other_code, other_output, _) = two.ends()
  assert code == other_code == 0
  assert "step      6/6" in output and not other_output
  assert_equal_values(numbers(tmp_path / "two"), numbers(one.workdir))


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
@pytest.mark.parametrize("lost, number", [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_ends_the_other_with_one_line(lost, number, tmp_path, cache):
  """Though jax would abort at once where process 0 is gone, and wait where the other hangs."""
  with Together(train_command(tmp_path / "run", cache, *LONG, "--peer_timeout=10")) as two:
    two.until("step      3/")
    code, (line,) = two.lose(lost, number)
    pid = two.processes[lost].pid
  assert code == 7
  assert line.startswith(f"error: process {lost} ({socket.gethostname()}, pid {pid}) ")
  assert line.endswith(
    "; start the same command again on all hosts; training goes on from its last checkpoint"
  )


@pytest.mark.slow
def test_a_mistake_on_one_host_ends_both(tmp_path):
  caches = [{"MOE_JAX_CACHE": str(tmp_path)}, {"MOE_JAX_CACHE": "/proc/nowhere"}]
  command = [x for x in train_command(tmp_path / "run", "") if "cache_dir" not in x]
  with Together(command, caches) as two:
    (code, _, line), (own_code, _, own_line) = two.ends()
  assert code == own_code == 2
  assert "cannot use the cache /proc/nowhere" in own_line[0]
  assert line[0].endswith("ended with an error: " + own_line[0].removeprefix("error: "))


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
  with Together(train_command(tmp_path / "run", cache, *LONG)) as two:
    two.until("step      3/")
    two.processes[1].send_signal(signal.SIGINT)
    while not two.processes[1].stderr.readline().startswith("stopping after this step"):
      pass
    two.processes[1].send_signal(signal.SIGINT)
    (code, _, line), (own_code, _, _) = two.ends()
  assert code == own_code == 130
  assert line[0].endswith("was interrupted")


def test_every_sequence_is_of_one_process():
  within = np.arange(8).reshape(2, 2, 1, 2) // 4
  sharding.check_processes(within)  # two processes of four devices, tensor inside of each
  sharding.check_processes(within[::-1])  # in another order, as on a TPU's torus
  with pytest.raises(UserError, match="divides the 4 device"):
    sharding.check_processes(np.arange(8).reshape(2, 2, 1, 2) % 2)
