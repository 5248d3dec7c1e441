"""train.py, eval.py and generate.py as processes: what they write, resume and refuse."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import config as config_lib
from tests.support.scripts import (
  ONE_DEVICE,
  WITHOUT_THREADS,
  checkpoint_of,
  command,
  evaluate,
  generate,
  losses_of,
  train,
)
from tests.support.toys import ROOT


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("whole")
  output = train(workdir, cache)
  return workdir, output


def assert_same_run(workdir, whole):
  """Bit for bit: every weight, moment and counter, and every loss on the way."""
  got, want = checkpoint_of(workdir, 12), checkpoint_of(whole, 12)
  assert np.abs(got["bias_ZE"]).max() > 0
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert losses_of(workdir) == losses_of(whole)
  iterator = [(w / "checkpoints/12/data").rglob("*.json") for w in (workdir, whole)]
  assert [p.read_text() for p in iterator[0]] == [p.read_text() for p in iterator[1]]


def test_a_run_leaves_its_contract(whole_run):
  workdir, output = whole_run
  assert config_lib.from_json((workdir / "config.json").read_text()).train.steps == 12
  assert sorted(losses_of(workdir)) == list(range(1, 13))
  assert list((workdir / "tensorboard").glob("events.*"))
  line = next(line for line in output.splitlines() if line.startswith("step     10/12"))
  for part in ("loss", "balance", "dropped", "tokens/s", "ETA"):
    assert part in line
  assert "\nattention          blocks; differs from the reference by" in output
  assert json.loads((workdir / "kernels.json").read_text())["attention"] == "blocks"
  steps = losses_of(workdir)
  assert steps[12] < steps[1] - 0.5, "it does not learn"
  kept = {int(p.name) for p in (workdir / "checkpoints").iterdir()}
  assert 12 in kept and len(kept) <= 2


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(whole_run, tmp_path, cache):
  process = subprocess.Popen(
    command(tmp_path / "run", cache), cwd=ROOT, env=ONE_DEVICE, stdout=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if line.startswith("step      6/12"):
      process.send_signal(signal.SIGTERM)
      break
  output, _ = process.communicate(timeout=100)
  assert process.returncode == 0
  saved = re.search(r"SIGTERM: saved step (\d+)", output)
  assert saved and 6 <= int(saved[1]) < 12, output
  assert f"resuming {tmp_path / 'run'} at step {saved[1]}" in train(tmp_path / "run", cache)
  assert_same_run(tmp_path / "run", whole_run[0])


@pytest.mark.preflight
def test_sigkill_loses_only_the_steps_since_the_checkpoint(whole_run, tmp_path, cache):
  process = subprocess.Popen(
    command(tmp_path / "run", cache), cwd=ROOT, env=ONE_DEVICE, stdout=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if line.startswith("step      9/12"):  # step 4 was on disk before the save of 8 began
      process.kill()
      break
  process.communicate(timeout=100)
  output = train(tmp_path / "run", cache)
  assert "resuming" in output and "attention          blocks, as when the run began" in output
  assert_same_run(tmp_path / "run", whole_run[0])


def test_running_again_says_that_it_is_finished(whole_run, cache):
  started = time.time()
  assert "is finished: step 12 of 12" in train(whole_run[0], cache)
  assert time.time() - started < 60


def test_another_config_in_the_same_workdir_is_refused(whole_run, cache):
  before = (whole_run[0] / "config.json").read_text()
  done = subprocess.run(
    command(whole_run[0], cache, "--config.optimizer.learning_rate=0.5"),
    cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=100,
  )  # fmt: skip
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert "config.optimizer.learning_rate=0.5 (was 0.01)" in done.stderr
  assert (whole_run[0] / "config.json").read_text() == before


def as_read(text):
  return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.slow
def test_a_run_generates(whole_run, tmp_path):
  """The same text from the command line, from stdin, and in Python; without the data."""
  workdir = tmp_path / "moved"
  shutil.copytree(whole_run[0], workdir)
  (workdir / "data.json").unlink()
  done = generate(
    f"--workdir={workdir}", "--max_new_tokens=24", "--temperature=0", "--prompt=def ",
    "--prompt_file=-", "--lines", stdin="import os\nx"
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  prompts = ["def ", "import os", "x"]
  found = moe_jax.load(workdir).generate(prompts, max_new_tokens=24, temperature=0)
  assert all(len(c.tokens) == 24 or c.finished for c in found)
  parts = (f"--- {n + 1} of 3\n{c.prompt}{c.text}\n" for n, c in enumerate(found))
  assert done.stdout == as_read("".join(parts) + "\n")
  assert "tokens/s" in done.stderr


@pytest.mark.slow
def test_one_text_is_shown_as_it_is_drawn(whole_run, tmp_path):
  (tmp_path / "start.py").write_text("def f():\n")
  options = (f"--workdir={whole_run[0]}", f"--prompt_file={tmp_path / 'start.py'}", "--seed=1")
  done = generate(*options, "--max_new_tokens=90")
  (found,) = moe_jax.load(whole_run[0]).generate("def f():\n", max_new_tokens=90, seed=1)
  assert done.stdout == as_read(f"def f():\n{found.text}\n")


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ((), "--workdir is missing"),
    (("--workdir=WORKDIR",), "give --prompt=TEXT or --prompt_file=FILE"),
    (("--workdir=WORKDIR", "--prompt_file=none.txt"), "--prompt_file=none.txt: "),
    (("--workdir=nowhere", "--prompt=a"), "nowhere"),
  ],
)
def test_generate_refuses_in_one_line(whole_run, arguments, said):
  done = generate(*(a.replace("WORKDIR", str(whole_run[0])) for a in arguments))
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr


@pytest.mark.slow
def test_other_text_is_refused(whole_run, cache):
  """As when another Python's standard library stands behind the same name."""
  path = whole_run[0] / "data.json"
  before = path.read_text()
  try:
    path.write_text(before.replace(json.loads(before)["validation"], "0" * 64))
    for script in (
      command(whole_run[0], cache),
      [sys.executable, "eval.py", f"--workdir={whole_run[0]}"],
    ):
      done = subprocess.run(
        script, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=100
      )
      assert done.returncode == 2 and done.stderr.count("\n") == 1
      assert "the validation text is not the one" in done.stderr
  finally:
    path.write_text(before)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path, cache):
  arguments = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0"]
  done = subprocess.run(
    command(tmp_path / "run", cache, *arguments),
    cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: not finite at")
  assert "config.optimizer.learning_rate=1e+30" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_dense_run_saves_resumes_and_evaluates(tmp_path, cache):
  """It has no biases to save, and says nothing of experts."""
  dense = ("--config.model.moe.num_experts=0",)
  train(tmp_path / "run", cache, *dense, steps=6)
  assert "resuming" in train(tmp_path / "run", cache, *dense, steps=7)
  _, result = evaluate(tmp_path / "run")
  assert result["step"] == 7 and "load_ZE" not in result


def test_eval_needs_only_the_workdir(whole_run):
  workdir, _ = whole_run
  output, result = evaluate(workdir)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  trained = next(v for v in lines if v["step"] == 12 and "validation/loss" in v)
  assert result["loss"] == pytest.approx(trained["validation/loss"], rel=1e-6)
  assert result["perplexity"] == pytest.approx(np.exp(result["loss"]), rel=1e-6)
  # Four batches of eight rows of 64: nats over bits and bytes; separators are tokens of no byte.
  assert result["tokens"] == 4 * 8 * 64 >= result["bytes"] > 0.9 * result["tokens"]
  bits = result["loss"] * result["tokens"] / np.log(2) / result["bytes"]
  assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
  assert 0.5 < result["gzip_bits_per_byte"] < 4
  np.testing.assert_allclose(np.sum(result["load_ZE"], axis=1), 1.0, rtol=1e-5)
  assert np.shape(result["load_ZE"]) == (2, 4)
  for word in (
    "parameters",
    "active",
    "tokens/s",
    "bits per byte",
    "gzip -9",
    "dropped",
    "MaxVio",
    "entropy",
    "dead",
  ):
    assert word in output
  for name in ("loss.png", "load.png", "balance.png"):
    assert (workdir / name).read_bytes().startswith(b"\x89PNG")
  _, other = evaluate(workdir, "--split=test")
  assert other["split"] == "test" and other["loss"] != result["loss"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--workdir=/nowhere"], "no run; train one first"),
    (["--step=5"], "--step=5: no such checkpoint; there are"),
    ([], "--workdir is missing"),
  ],
)
def test_eval_mistakes_are_one_line(whole_run, arguments, message):
  if arguments == ["--step=5"]:
    arguments = [*arguments, f"--workdir={whole_run[0]}"]
  done = subprocess.run(
    [sys.executable, "eval.py", *arguments],
    cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=100,
  )  # fmt: skip
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_expert_parallel_run_follows_one_device_and_evaluates_anywhere(whole_run, tmp_path, cache):
  """The command of the README on eight devices: the loss curve of one; then eval on one device."""
  workdir = tmp_path / "run"
  train(
    workdir, cache, "--config.mesh.expert=4", "--config.mesh.data=2",
    env=WITHOUT_THREADS | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
  )  # fmt: skip
  got, want = losses_of(workdir), losses_of(whole_run[0])
  # Rounding grows from step to step; after 12 it is still far below the fall of the loss.
  assert got == pytest.approx(want, rel=2e-3)
  assert got[1] == pytest.approx(want[1], rel=1e-6)
  _, on_one = evaluate(workdir)
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  trained = next(v for v in lines if v["step"] == 12 and "validation/loss" in v)
  assert on_one["loss"] == pytest.approx(trained["validation/loss"], rel=1e-5)
  # One token near a tie may go the other way: 1 of 4096 assignments.
  np.testing.assert_allclose(on_one["load_ZE"], trained["validation/load_ZE"], atol=1e-3)
