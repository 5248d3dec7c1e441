"""generate.py: the same text as in Python, and what is refused."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

import moe_jax
from moe_jax.errors import UserError
from tests.support.scripts import ONE_DEVICE, call, python, refused
from tests.support.toys import ROOT


def as_read(text):
  return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.slow
def test_the_command_generates_what_python_does(whole_run, tmp_path):
  """After prompts from the command line and from stdin, by a workdir without the data."""
  workdir = shutil.copytree(whole_run.workdir, tmp_path / "run")
  (workdir / "data.json").unlink()
  done = python(
    "generate.py",
    f"--workdir={workdir}",
    f"--cache_dir={tmp_path / 'cache'}",
    "--max_new_tokens=24",
    "--temperature=0",
    "--prompt=def ",
    "--prompt_file=-",
    "--lines",
    input="import os\nx",
  )
  assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr
  model = moe_jax.load(workdir)
  texts = model.generate(["def ", "import os", "x"], max_new_tokens=24, temperature=0)
  assert all(len(c.tokens) == 24 or c.finished for c in texts)
  parts = (f"--- {n + 1} of 3\n{c.prompt}{c.text}\n" for n, c in enumerate(texts))
  assert done.stdout == as_read("".join(parts) + "\n")
  programs = tmp_path / "cache/xla"  # stored where the flag says, for this user alone
  assert any("prefill" in path.name for path in programs.iterdir())
  assert [stat.S_IMODE(p.stat().st_mode) for p in (programs, programs.parent)] == [0o700] * 2


@pytest.mark.slow
def test_one_text_is_shown_as_it_is_drawn(whole_run, tmp_path):
  (tmp_path / "start.py").write_text("def f():\n")
  options = (f"--workdir={whole_run.workdir}", f"--prompt_file={tmp_path / 'start.py'}", "--seed=1")
  done = call("generate.py", *options, "--max_new_tokens=90")
  model = moe_jax.load(whole_run.workdir)
  (expected,) = model.generate("def f():\n", max_new_tokens=90, seed=1)
  assert done.stdout == as_read(f"def f():\n{expected.text}\n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--workdir is missing"),
    (("--workdir=WORKDIR",), "give --prompt=TEXT or --prompt_file=FILE"),
    (("--workdir=WORKDIR", "--prompt_file=none.txt"), "--prompt_file=none.txt: No such file"),
    (("--workdir=WORKDIR", "--prompt_file=tests"), "--prompt_file=tests: Is a directory"),
    (("--workdir=WORKDIR", "--prompt_file=/dev/zero"), "--prompt_file=/dev/zero: over 67,108,864"),
    (("--workdir=WORKDIR", b"--prompt=a\xff"), r"--prompt=a\udcff: this is not UTF-8"),
    (("--workdir=nowhere", "--prompt=a"), "nowhere"),
  ],
)
def test_generate_refuses_in_one_line(whole_run, arguments, message):
  given = [os.fsdecode(a).replace("WORKDIR", str(whole_run.workdir)) for a in arguments]
  assert message in refused("generate.py", *given)


def test_a_prompt_on_stdin_that_is_not_text_is_refused(whole_run):
  options = (f"--workdir={whole_run.workdir}", "--prompt_file=-")
  done = python("generate.py", *options, input=b"a\xff", text=False)
  assert (done.returncode, done.stdout) == (2, b"")
  assert done.stderr == b"error: --prompt_file=-: this is not UTF-8 text; convert it\n"


def started(whole_run, *options, **streams):
  return subprocess.Popen(
    [sys.executable, "generate.py", f"--workdir={whole_run.workdir}", *options],
    cwd=ROOT,
    env=ONE_DEVICE,
    stderr=subprocess.PIPE,
    text=True,
    **streams,
  )


LONG = ("--prompt=def ", "--max_new_tokens=100000")


@pytest.mark.slow
def test_ctrl_c_ends_a_text_where_it_is(whole_run):
  process = started(whole_run, *LONG, stdout=subprocess.PIPE)
  first = process.stdout.read(5)
  time.sleep(1)
  process.send_signal(signal.SIGINT)
  rest, said = process.communicate(timeout=600)
  assert process.returncode == 130 and (first + rest).startswith("def ") and rest.endswith("\n")
  assert said.count("\n") == 1 and "tokens/s" in said


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 6])
def test_ctrl_c_before_there_is_text_ends_at_once(seconds, whole_run, tmp_path):
  """While jax is imported, weights are read, and programs are compiled anew."""
  process = started(whole_run, *LONG, f"--cache_dir={tmp_path}", stdout=subprocess.PIPE)
  time.sleep(seconds)
  process.send_signal(signal.SIGINT)
  out, said = process.communicate(timeout=600)
  assert process.returncode in (-signal.SIGINT, 130)  # a shell calls both 130
  assert "Traceback" not in said and (not out or out.startswith("def "))


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_text(whole_run):
  """As `| head -1` does."""
  read, write = os.pipe()
  process = started(whole_run, *LONG[:1], stdout=write)
  os.close(write)
  os.close(read)
  _, said = process.communicate(timeout=600)
  assert (process.returncode, said) == (128 + signal.SIGPIPE, "")


@pytest.mark.slow
def test_other_streams_may_be_closed(whole_run):
  command = shlex.join([sys.executable, "generate.py", f"--workdir={whole_run.workdir}"])
  command += " --prompt=x --max_new_tokens=4 --temperature=0"

  def bash(streams):
    return subprocess.run(
      ["bash", "-c", command + streams], cwd=ROOT, env=ONE_DEVICE, capture_output=True
    )

  done, disk = bash(" <&- 2>&-"), bash(" >/dev/full")
  (full,) = moe_jax.load(whole_run.workdir).generate("x", max_new_tokens=4, temperature=0)
  assert done.returncode == 0 and done.stdout.decode() == as_read(f"x{full.text}\n")
  assert disk.returncode == 3 and b"No space left" in disk.stderr


def test_a_run_records_its_tokenizer_and_another_file_is_refused(whole_run, tmp_path):
  assert json.loads((whole_run.workdir / "data.json").read_text())["tokenizer"] == "bytes"
  run = shutil.copytree(ROOT / "tests/golden_run", tmp_path / "run")
  data = json.loads((run / "data.json").read_text())
  (run / "data.json").write_text(json.dumps(data | {"tokenizer": "bytes"}))
  assert moe_jax.load(run).tokenizer.fingerprint == "bytes"
  (run / "data.json").write_text(json.dumps(data | {"tokenizer": "0123456789abcdef"}))
  with pytest.raises(UserError, match=r"file of config.data.tokenizer is not the one"):
    moe_jax.load(run)
