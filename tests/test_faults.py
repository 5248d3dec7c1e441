"""Runs of train.py that are killed, share a workdir, or find their disk full or read-only."""

import contextlib
import json
import pathlib
import re
import signal
import subprocess

import pytest

from moe_jax.storage import workdir as workdir_lib
from tests.support import disks
from tests.support.scripts import ONE_DEVICE, call, command, losses_of, python
from tests.support.toys import ROOT

pytestmark = pytest.mark.slow


def lines_of(workdir):
  """Metrics without times, which differ from run to run."""
  lines = workdir_lib.read_lines(workdir / workdir_lib.METRICS)
  timed = re.compile("train/(seconds|save_seconds|steps_per_s|tokens_per_s)")
  return [{k: v for k, v in line.items() if not timed.match(k)} for line in lines]


def test_kills_change_nothing(tmp_path, cache):
  """At random moments, of which many lie in a save: it takes about a third of the time."""
  done = python("-m", "tests.support.kill_worker", tmp_path, 0, 4, timeout=1500)
  assert done.returncode == 0, done.stderr
  whole, *ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
  assert whole == (60, 0)
  assert len(ends) == 5 and ends[-1] == (60, 0)
  assert sum(code == -9 for _, code in ends) == 4, ends
  whole, parts = tmp_path / "whole/run", tmp_path / "killed/run"
  about = [json.loads((p / "checkpoints/60/about/metadata").read_text()) for p in (whole, parts)]
  assert about[0] == about[1]
  assert lines_of(parts) == lines_of(whole)
  logs = [path.read_text() for path in (tmp_path / "killed").glob("child*.log")]
  assert sum("resuming" in log for log in logs) > 2
  assert not any("Traceback" in log or "set aside" in log for log in logs)


def attempt(workdir, cache, *arguments, steps=40):
  arguments = ("--config.train.keep_latest=9", *arguments)
  return python(*command(workdir, cache, *arguments, steps=steps)[1:])


def lines_of_errors(done):
  said = "tokenized "  # by the first run with this cache
  return [line for line in done.stderr.splitlines() if not line.startswith(said)]


def one_line(done, code, *said):
  assert done.returncode == code, done.stderr
  lines = lines_of_errors(done)
  assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
  for text in said:
    assert text in done.stderr


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, cache):
  disk = tmp_path / "disk"
  with disks.small_disk(disk, "2m"):
    for _ in range(2):  # the second start finds it full as well
      done = attempt(disk / "run", cache)
      one_line(done, 3, "No space left on device", "intact, and the same command goes on")
      steps = workdir_lib.saved_steps(disk / "run")
      intact = (f"the checkpoints of steps {steps} are intact", "what was saved before is intact")
      assert steps and any(text in done.stderr for text in intact)
    subprocess.run(["mount", "-o", "remount,size=80m", str(disk)], check=True)
    done = attempt(disk / "run", cache)
    assert done.returncode == 0 and f"at step {steps[-1]}" in done.stdout, done.stderr
    assert list(losses_of(disk / "run")) == list(range(1, 41))
    assert not list((disk / "run/checkpoints").glob("*tmp*"))


def test_a_disk_without_room_for_a_line_or_read_only_is_one_line(tmp_path, cache):
  disk = tmp_path / "disk"
  with disks.small_disk(disk, "2m"):
    assert attempt(disk / "run", cache, steps=8).returncode == 0
    filler = disks.fill(disk)
    one_line(attempt(disk / "run", cache, steps=400), 3, "No space left on device")
    assert workdir_lib.saved_steps(disk / "run") == [4, 8]
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name in ("run", "new"):
      done = call(*command(disk / name, cache, "--config.train.keep_latest=9")[1:])
      one_line(done, 3, "Read-only file system")
    assert workdir_lib.saved_steps(disk / "run") == [4, 8]


def test_a_checkpoint_folder_that_cannot_be_made_is_one_line_and_the_end(tmp_path, cache):
  """The threads of its save wait for each other for 300 s, and nobody for them."""
  with disks.small_disk(tmp_path / "disk", "80m,nr_inodes=14") as disk:
    done = python(*command(disk / "run", cache, steps=40)[1:], timeout=120)
    one_line(done, 3, "cannot write a checkpoint in", "No space left on device")


def test_a_second_training_in_a_workdir_is_refused(tmp_path, cache):
  """And the first one trains as if nothing had been; after its SIGKILL the workdir is free."""
  workdir = tmp_path / "run"
  first = subprocess.Popen(
    command(workdir, cache, steps=100_000),
    cwd=ROOT,
    env=ONE_DEVICE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    while "step " not in first.stdout.readline():
      assert first.poll() is None
    second = attempt(workdir, cache, "--config.train.keep_latest=2", steps=100_000)
    one_line(second, 5, f"another training runs there (process {first.pid} on ")
    assert first.poll() is None
  finally:
    first.kill()
    first.communicate()
  steps = [line["step"] for line in workdir_lib.read_lines(workdir / "metrics.jsonl")]
  assert steps == sorted(steps)
  newest = workdir_lib.saved_steps(workdir)[-1]
  done = call(*command(workdir, cache, steps=newest)[1:])
  assert done.returncode == 0 and "is finished" in done.stdout, done


@pytest.mark.parametrize(
  ("reader", "saves"), [("head -1", False), ("grep -m 1 'step     21'", True)]
)
def test_a_run_whose_reader_closes_the_pipe_saves_and_ends_with_its_code(
  reader, saves, tmp_path, cache
):
  shell = " ".join(command(tmp_path / "run", cache, steps=100_000))
  done = subprocess.run(
    ["bash", "-c", f"{shell} | {reader}; exit ${{PIPESTATUS[0]}}"],
    cwd=ROOT,
    env=ONE_DEVICE,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 141 and not lines_of_errors(done), done.stderr
  assert (max(workdir_lib.saved_steps(tmp_path / "run"), default=0) > 20) == saves


def test_ctrl_c_saves_though_what_it_prints_to_ends_as_well(tmp_path, cache):
  """As `train.py | tee log` does: a terminal sends the signal to both."""
  first = subprocess.Popen(
    command(tmp_path / "run", cache, "--config.train.checkpoint_every=1000", steps=100_000),
    cwd=ROOT,
    env=ONE_DEVICE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not first.stdout.readline().startswith("step      5/"):
    assert first.poll() is None
  first.stdout.close()
  first.send_signal(signal.SIGINT)
  _, said = first.communicate(timeout=600)
  assert first.returncode == 0 and "stopping after this step" in said, said
  assert len(workdir_lib.saved_steps(tmp_path / "run")) == 1


def test_memory_and_threads_do_not_grow(tmp_path, cache):
  """Of a run of sixty saves, between its first quarter and its end."""
  process = subprocess.Popen(
    command(tmp_path / "run", cache, "--config.train.checkpoint_every=1", steps=60),
    cwd=ROOT,
    env=ONE_DEVICE,
    stdout=subprocess.PIPE,
    text=True,
  )
  status, seen = pathlib.Path(f"/proc/{process.pid}/status"), []
  with process:
    for line in process.stdout:
      if match := re.match(r"step +(\d+)/", line):
        with contextlib.suppress(OSError):
          text = status.read_text()
          now = [int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("VmRSS", "Threads")]
          seen.append([int(match[1]), *now])
  assert process.returncode == 0
  early = [row for row in seen if 15 <= row[0] <= 27]
  late = [row for row in seen if row[0] > 48]
  middle = [
    sum(row[column] for row in rows) / len(rows) for rows in (early, late) for column in (1, 2)
  ]
  assert middle[2] < 1.06 * middle[0], middle
  assert middle[3] < middle[1] + 3, middle
