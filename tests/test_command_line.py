"""From arguments to a config and back to text; a mistake is one line and leaves nothing."""

import os
import re
import signal
import subprocess
import sys

import pytest

from moe_jax import command_line
from moe_jax import config as config_lib
from moe_jax.config import Router, UserError
from tests.support.toys import ROOT, toy_config

COMMANDS = {
  "--config=configs/debug.py --config.model.moe.num_expert=5": "nearest is config.model.moe.num",
  "--config=configs/debug.py --config.model.moe.num_experts=abc": "num_experts=abc",
  "--config=configs/debug.py --config.model.moe.router=best": "switch|topk|noisy_topk",
  "--config=configs/debug.py --config.model.moe.top_k=9": "config.model.moe.num_experts=4",
  "--config=configs/debug.py --config.mesh.expert=3": "config.mesh.expert=3",
  "--config=configs/debug.py --workdri=x": "workdri",
  "--config=configs/debug.py stray": "stray",
  "--config=configs/none.py": "no such file",
  "--config=README.md": "README.md: not a Python file",
  "--config={tmp}/typo.py": "typo.py:5: there is no field config.model.moe.num_expert;",
  "--config={tmp}/broken.py": "broken.py:3: ZeroDivisionError",
  "--config={tmp}/cache.py": "cache.py:5: there is no field config.data.cache_dir; the flag --cac",
  "--config=configs/debug.py --config.data.cache_dir=x": "data.cache_dir; the flag --cache_dir",
  "--config.train.steps=1": "--config is missing before it",
  "--config=configs/debug.py --config=configs/tiny_moe.py": "--config is given twice",
  "--config=configs/debug.py --config.model.moe.capacity_factor=0": "inf is no limit",
  "": "--config is missing",
}


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_wrong_command_is_one_line_and_makes_nothing(arguments, tmp_path):
  lines = ["from moe_jax.config import Config, Model, MoE", "", "", "def get_config():"]
  typo = [*lines, "  return Config(model=Model(moe=MoE(num_expert=8)))"]
  (tmp_path / "typo.py").write_text("\n".join(typo))
  cached = [*lines, "  return Config(data=Data(cache_dir='x'))"]
  cached[0] += ", Data"
  (tmp_path / "cache.py").write_text("\n".join(cached))
  (tmp_path / "broken.py").write_text("def get_config():\n  n = 0\n  return 1 / n\n")
  workdir = tmp_path / "workdir"
  command = [sys.executable, "train.py", *arguments.format(tmp=tmp_path).split()]
  if "workdri" not in arguments and arguments:
    command.append(f"--workdir={workdir}")
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
  assert COMMANDS[arguments] in done.stderr
  assert not workdir.exists() and not done.stdout


def said(*arguments, script="train.py"):
  command = [sys.executable, "-X", "importtime", script, *arguments]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 0, done.stderr
  assert not re.search(r"\| +jax$", done.stderr, re.M), "imports jax"
  return done.stdout


def test_help_lists_every_field():
  text = said("--help")
  assert "--workdir" in text and "Trains a model" in text
  for section in ("model", "model.moe", "data", "mesh"):
    assert f"\nconfig.{section}: " in text
  for name in config_lib.field_names():
    assert f"\n  {name.rsplit('.', 1)[1]} = " in text, name
  assert "capacity_factor = 1.25 " in text and "inf is no limit" in text
  assert "top_k = 2" in said("--help", script="sweep.py")
  assert "top_k = 2" not in said("--help", script="eval.py")


def test_what_differs_from_the_defaults():
  arguments = "--diff", "--config=configs/debug.py", "--config.model.moe.capacity_factor=inf"
  lines = said(*arguments, "--config.model.moe.top_k=1", "--config.data.path=x").splitlines()
  assert "config.model.moe.top_k = 1   (default 2)" in lines
  assert "config.model.moe.capacity_factor = inf   (default 1.25)" in lines
  assert "config.data.path = x   (default empty)" in lines
  assert "config.model.moe.num_experts = 4   (default 0)" in lines
  assert not any("qk_norm" in line for line in lines)
  assert command_line.difference(config_lib.Config()) == "every field has its default"


OVERRIDES = {
  "model.qk_norm": True, "model.moe.router": Router.HASH, "loss.z": 1.0, "data.path": "a=b",
  "model.moe.capacity_factor": float("inf"), "train.steps": 2,
}  # fmt: skip


def test_overrides_are_spelled_as_in_train():
  """The last word of a field counts, and what is no override is left for the flags."""
  overrides, rest = command_line.take_overrides(
    ["sweep.py", "--config.model.qk_norm=true", "--config.model.moe.router=hash", "--jobs=2",
     "-config.loss.z=1", "--config.data.path=a=b", "--config.model.moe.capacity_factor=inf",
     "--config.train.steps=1", "--config.train.steps=2"]
  )  # fmt: skip
  assert rest == ["sweep.py", "--jobs=2"] and overrides == OVERRIDES


def test_overrides_become_words_again():
  config = command_line.override(config_lib.Config(), OVERRIDES, "here")
  assert config.model.moe.router is Router.HASH and config.loss.z == 1.0
  assert command_line.words(config_lib.Config(), config)[:2] == [
    "--config.model.qk_norm=true", "--config.model.moe.router=hash"
  ]  # fmt: skip


@pytest.mark.parametrize(("argument", "why"), [
  ("--config.train.step=3", "nearest is config.train.steps"),
  ("--config.train.steps=many", "'many' is not of int"),
  ("--config.model.moe.router=best", "not of switch, topk"),
  ("--config.model.qk_norm=1", "write --config.model.qk_norm=true"),
  ("--config.train.steps", "write --config.train.steps=VALUE"),
])  # fmt: skip
def test_a_wrong_override_is_refused(argument, why):
  with pytest.raises(UserError, match=re.escape(argument) + ".*" + why):
    command_line.take_overrides([argument])


@pytest.mark.parametrize("router", [Router.SINKHORN, "sinkhorn"])
def test_override_takes_members_and_values(router):
  config = toy_config()
  changed = command_line.override(config, {"model.moe.router": router, "train.steps": 3}, "here")
  assert changed.model.moe.router is Router.SINKHORN and changed.train.steps == 3
  assert config.model.moe.router is Router.TOPK  # a copy was changed


@pytest.mark.parametrize(("fields", "why"), [
  ({"train.step": 3}, r"here: .*train.step; the nearest is config.train.steps"),
  ({"model.moe.router": "best"}, "router='best' is not one of: switch"),
  ({"model.remat": "dot"}, r"config.model.remat='dot' is not one of: none"),
])  # fmt: skip
def test_override_refuses(fields, why):
  with pytest.raises(UserError, match=why):
    command_line.override(toy_config(), fields, "here")


def test_an_override_takes_the_words_of_config_json():
  base = config_lib.Config()
  flat = config_lib.flatten(base) | {"model.moe.capacity_factor": "inf", "model.remat": "dots"}
  config = command_line.override(base, flat, "here")
  assert config_lib.flatten(config) == flat and config.model.remat is config_lib.Remat.DOTS
  assert base == config_lib.Config()  # a copy was changed


_PRINTS_THE_CACHE = """
import subprocess, sys
from moe_jax import command_line

def main():
  code = "from moe_jax.data import cache; print(cache.directory())"
  print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)

command_line.run(main)
"""


@pytest.mark.parametrize(("arguments", "folder"), [(["--cache_dir=c"], "c"), ([], "of_env")])
def test_the_flag_names_the_cache_of_a_process_and_of_its_children(arguments, folder, tmp_path):
  env = {**os.environ, "MOE_JAX_CACHE": str(tmp_path / "of_env"), "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", _PRINTS_THE_CACHE, *arguments],
    cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100,
  )  # fmt: skip
  assert done.stdout.strip() == str(tmp_path / folder), done.stderr


def test_mixtral_counts():
  done = subprocess.run(
    [sys.executable, "train.py", "--config=configs/mixtral_8x7b.py", "--describe"],
    cwd=ROOT, capture_output=True, text=True, timeout=100,
  )  # fmt: skip
  assert "46.70B total, 12.88B active" in done.stdout


_PRINTS_TEXT = r"""
import os, sys
from moe_jax import command_line
from moe_jax.config import UserError

def main():
  print(sys.argv[1])
  with open(os.devnull) as file:  # takes no number of a closed stream
    assert file.fileno() > 2
  print("to stderr", file=sys.stderr)
  raise UserError("no \x1b[31m \udcff\n\n \u65e5")

command_line.one_line_errors(main)
"""


def prints_text(argument, how="", **variables):
  command = f"{sys.executable} -c '{_PRINTS_TEXT}' '{argument}' {how}"
  env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
  return subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True)


def test_an_error_prints_what_a_terminal_would_not():
  done = prints_text("x")
  assert done.returncode == 2
  assert done.stderr == "to stderr\nerror: no \\x1b[31m \\udcff \u65e5\n".encode()


def test_text_that_a_terminal_cannot_show_is_spelled():
  done = prints_text("\u65e5", PYTHONIOENCODING="latin-1", PYTHONUTF8="1")
  assert done.returncode == 2 and done.stdout == b"\\u65e5\n"


@pytest.mark.parametrize(("how", "out"), [("2>&-", b"x\n"), (">&-", b""), ("<&-", b"x\n")])
def test_closed_streams_take_no_number_of_a_file(how, out):
  """What libraries print on stderr would be written into the file that has its number."""
  done = prints_text("x", how)
  assert (done.returncode, done.stdout) == (2, out)
  assert b"to stderr" in done.stderr or how == "2>&-"


def test_ctrl_c_ends_a_program_with_130_and_without_a_traceback():
  code = (
    "import os, signal\nfrom moe_jax import command_line\n"
    "command_line.one_line_errors(lambda: os.kill(os.getpid(), signal.SIGINT))"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (130, "")


def test_a_reader_that_closes_the_output_ends_the_program_without_a_traceback():
  command = f"{sys.executable} train.py --help | head -1; exit ${{PIPESTATUS[0]}}"
  done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.startswith("Trains a model") and not done.stderr
  assert done.returncode in (0, 128 + signal.SIGPIPE)  # 0: all was written before `head` ended
