"""generate.py as a process: the same text as in Python, and what is refused."""

import shutil
import sys

import pytest

import moe_jax
from tests.support.scripts import built, generate, refused

PROMPTS = ["def ", "import os", "x"]


def as_read(text):
  return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.fixture(scope="module")
def generated(shared_folder, whole_run):
  """Texts after prompts from the command line and from stdin, by a workdir without the data."""

  def build(path):
    workdir = shutil.copytree(whole_run.workdir, path / "run")
    (workdir / "data.json").unlink()
    done = generate(
      f"--workdir={workdir}", "--max_new_tokens=24", "--temperature=0", "--prompt=def ",
      "--prompt_file=-", "--lines", stdin="import os\nx"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {"stdout": done.stdout, "stderr": done.stderr}

  return built(shared_folder / "generated", build)


@pytest.mark.slow
def test_the_command_generates_what_python_does(generated):
  model = moe_jax.load(generated.path / "run")
  texts = model.generate(PROMPTS, max_new_tokens=24, temperature=0)
  assert all(len(c.tokens) == 24 or c.finished for c in texts)
  parts = (f"--- {n + 1} of 3\n{c.prompt}{c.text}\n" for n, c in enumerate(texts))
  assert generated.said["stdout"] == as_read("".join(parts) + "\n")


@pytest.mark.slow
def test_the_speed_of_generation_goes_to_stderr(generated):
  assert "tokens/s" in generated.said["stderr"]


@pytest.mark.slow
def test_one_text_is_shown_as_it_is_drawn(whole_run, tmp_path):
  (tmp_path / "start.py").write_text("def f():\n")
  options = (f"--workdir={whole_run.workdir}", f"--prompt_file={tmp_path / 'start.py'}", "--seed=1")
  done = generate(*options, "--max_new_tokens=90")
  model = moe_jax.load(whole_run.workdir)
  (expected,) = model.generate("def f():\n", max_new_tokens=90, seed=1)
  assert done.stdout == as_read(f"def f():\n{expected.text}\n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--workdir is missing"),
    (("--workdir=WORKDIR",), "give --prompt=TEXT or --prompt_file=FILE"),
    (("--workdir=WORKDIR", "--prompt_file=none.txt"), "--prompt_file=none.txt: "),
    (("--workdir=nowhere", "--prompt=a"), "nowhere"),
  ],
)
def test_generate_refuses_in_one_line(whole_run, arguments, message):
  given = [a.replace("WORKDIR", str(whole_run.workdir)) for a in arguments]
  assert message in refused([sys.executable, "generate.py", *given])
