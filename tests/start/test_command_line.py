"""From arguments to a config and back to text; a mistake is one line and leaves nothing."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from moe_jax.config import Config, Router, override
from moe_jax.config.run import field_names, to_json
from moe_jax.errors import UserError
from moe_jax.start import command_line
from tests.support.scripts import call, python, refused
from tests.support.toys import ROOT

COMMANDS = {
  "--config=configs/debug.py --config.model.moe.num_expert=5": "nearest is config.model.moe.num",
  "--config=configs/debug.py --config.model.moe.num_experts=abc": "num_experts=abc",
  "--config=configs/debug.py --config.model.moe.router=best": "switch, topk, noisy_topk",
  "--config=configs/debug.py --config.model.moe.top_k=9": "config.model.moe.num_experts=4",
  "--config=configs/debug.py --workdri=x": "'--workdri=x'; the nearest is --workdir",
  "--config=configs/debug.py --replay=-1": "--replay: -1 must be at least 0",
  "--config=configs/debug.py --replay=x": "--replay: invalid int value: 'x'",
  "--config=configs/debug.py --device=v1": "--device: invalid choice: 'v1'",
  "--config=configs/debug.py stray": "stray",
  "--config=configs/none.py": "no such file",
  "--config=README.md": "README.md: not a Python file",
  "--config={tmp}/typo.py": "typo.py:5: there is no field config.model.moe.num_expert;",
  "--config={tmp}/broken.py": "broken.py:3: ZeroDivisionError",
  "--config={tmp}/syntax.py": "syntax.py:2: SyntaxError: ",
  "--config={tmp}/exits.py": "exits.py:3: SystemExit: 3",
  "--config={tmp}/empty.py": "defines no get_config()",
  "--config={tmp}/none.py": "get_config() returned NoneType",
  "--config={tmp}/cache.py": "cache.py:5: there is no field config.data.cache_dir; the flag --cac",
  "--config=configs/debug.py --config.data.cache_dir=x": "data.cache_dir; the flag --cache_dir",
  "--config=configs/debug.py --cache_dir=gs://b/c": "--cache_dir=gs://b/c: the cache is a folder",
  "--config={tmp}/assigns.py": "assigns.py:6: config.model.moe.top_k = 1: a config does not "
  'change; make another: override(config, {"model.moe.top_k": 1}), or dataclasses.replace',
  "--config={tmp}/assigns_typo.py": "assigns_typo.py:6: config.model.moe.topk = 1: a config does",
  "--config.train.steps=1": "--config is missing",
  "--config=configs/debug.py --config=configs/tiny_moe.py": "--config is given twice",
  "--config=configs/debug.py --config.model.dim=100000000000000000000": "at most 2147483647",
  "--config=configs/debug.py --config.model.vocab_size=80000000000": "vocab_size=80000000000 is",
  "--config=configs/debug.py --config.model.num_layers=1000000": "num_layers=1000000 must be",
  "--config=configs/debug.py --config.data.seed=4294967296": "at most 4294967295",
  "--config=configs/debug.py --config.data.threads=100000": "at most 256",
  "": "--config is missing",
}
_ASSIGNS = (
  "from configs import debug\n\n\ndef get_config():\n  config = debug.get_config()\n"
  "  config.model.moe.{} = 1\n  return config\n"
)
FILES = {
  "typo.py": "from moe_jax.config import Config, Model, MoE\n\n\ndef get_config():\n"
  "  return Config(model=Model(moe=MoE(num_expert=8)))\n",
  "broken.py": "def get_config():\n  n = 0\n  return 1 / n\n",
  "syntax.py": "def get_config():\n  return 1 +\n",
  "exits.py": "import sys\ndef get_config():\n  sys.exit(3)\n",
  "cache.py": "from moe_jax.config import Config, Data\n\n\ndef get_config():\n"
  "  return Config(data=Data(cache_dir='x'))\n",
  "assigns.py": _ASSIGNS.format("top_k"),
  "assigns_typo.py": _ASSIGNS.format("topk"),
  "empty.py": "",
  "none.py": "def get_config():\n  pass\n",
  "interrupted.py": "import os, signal\ndef get_config():\n  os.kill(os.getpid(), signal.SIGINT)\n",
}
# Runs a script in a Python that has no jax, as the shell does otherwise.
WITHOUT_JAX = (
  "import runpy, sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:]; "
  "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def one_line(*command):
  """The line on stderr of a command that ends with code 2, at once and without jax."""
  before = time.process_time()
  line = refused(*command, imports_jax=False)
  assert time.process_time() - before < 3  # seconds; it takes a tenth of that
  return line


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_wrong_command_is_one_line_and_makes_nothing(arguments, tmp_path):
  for name, text in FILES.items():
    (tmp_path / name).write_text(text)
  workdir = tmp_path / "workdir"
  command = ["train.py", *arguments.format(tmp=tmp_path).split()]
  if "workdri" not in arguments and arguments:
    command.append(f"--workdir={workdir}")
  assert COMMANDS[arguments] in one_line(*command)
  assert not workdir.exists()


def test_ctrl_c_has_no_traceback(tmp_path):
  (tmp_path / "interrupted.py").write_text(FILES["interrupted.py"])
  done = python("train.py", f"--config={tmp_path / 'interrupted.py'}")
  assert (done.returncode, done.stderr, done.stdout) == (128 + signal.SIGINT, "", "")


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_ends_an_import_at_once(before):
  """Unless it is ignored, as under nohup."""
  old = signal.signal(signal.SIGINT, before)
  try:
    with command_line.importing():
      inside = signal.getsignal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
  finally:
    signal.signal(signal.SIGINT, old)
  assert inside == (signal.SIG_DFL if before is signal.default_int_handler else signal.SIG_IGN)


_LOSES_CTRL_C = """
import gc, signal
from moe_jax.start import command_line

def main():
  gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
  gc.collect()
  print("it went on")

command_line.one_line_errors(main)
"""


def test_ctrl_c_while_garbage_is_collected_is_not_lost():
  """Python ignores what is raised there, and jax has a function there."""
  done = python("-c", _LOSES_CTRL_C)
  assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_hook_of_before_hears_what_is_lost(monkeypatch):
  heard = []
  monkeypatch.setattr(sys, "unraisablehook", heard.append)
  command_line.one_line_errors(lambda: None)
  lost = types.SimpleNamespace(exc_type=ValueError)
  sys.unraisablehook(lost)
  assert heard == [lost]


TRAIN = ("train.py", "--config=configs/debug.py", "--workdir")
SWEEP = ("sweep.py", "--sweep=configs/sweeps/balance.py", "--out")
EVALUATE, GENERATE = ("eval.py", "--workdir"), ("generate.py", "--prompt=a", "--workdir")
LONG = "n" * 300
FOLDERS = [
  (TRAIN, "file", "Not a directory"), (TRAIN, "file/below", "Not a directory"),
  (TRAIN, LONG, "File name too long"), (TRAIN, f"new/{LONG}", "File name too long"),
  (TRAIN, "new/" * 1100, "File name too long"), (TRAIN, "/proc/new", "No such file"),
  (TRAIN, "nowhere", "No such file"), (SWEEP, "file", "Not a directory"),
  (SWEEP, "/proc/new", "No such file"), (EVALUATE, "file", "no config.json there"),
  (EVALUATE, LONG, "no config.json there"), (GENERATE, "file/below", "no config.json there"),
  (GENERATE, LONG, "no config.json there"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("script", "folder", "why"), FOLDERS, ids=[f"{s[0]}-{f[:12]}" for s, f, _ in FOLDERS]
)
def test_a_folder_that_cannot_be_made_or_read_is_one_line(script, folder, why, tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
  line = one_line(*script[:-1], f"{script[-1]}={tmp_path / folder}")
  assert f"{script[-1]}={tmp_path / folder}" in line and why in line
  assert {path.name for path in tmp_path.iterdir()} == {"file", "nowhere"}


@pytest.mark.parametrize("script", [TRAIN, SWEEP, EVALUATE, GENERATE], ids=lambda s: s[0])
def test_a_process_that_is_refused_has_one_line_and_no_jax(script, tmp_path):
  """The same line as in this process, which the tests above and those of each script look at."""
  (tmp_path / "file").touch()
  command = *script[:-1], f"{script[-1]}={tmp_path / 'file'}"
  done = python("-c", WITHOUT_JAX, *command)
  assert (done.returncode, done.stdout, done.stderr) == (2, "", one_line(*command))


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
  command_line.check_folder("workdir", str(tmp_path / "a" / "b"))
  command_line.check_folder("workdir", str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_a_read_only_disk_has_a_code_of_its_own(tmp_path):
  own_mounts = ["unshare", "--map-root-user", "--mount"]
  if not shutil.which("unshare") or subprocess.run([*own_mounts, "true"]).returncode:
    pytest.skip("this system lets nobody mount a disk of their own")
  command = shlex.join([sys.executable, *TRAIN[:-1], f"--workdir={tmp_path}/new"])
  mount = f"mount -t tmpfs -o ro none {tmp_path}"
  done = subprocess.run(
    [*own_mounts, "sh", "-c", f"{mount} && {command}"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 3 and "Read-only file system" in done.stderr, done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  ("field", "value", "why"),
  [
    ("model.dim", 10**20, "config.model.dim=100000000000000000000 is too large"),
    ("train.seed", -1, "config.train.seed=-1 must be at least 0"),
    ("data.path", "x", "config.data.path=x with config.data.name=python_stdlib"),
    ("optimizer.eps", "much", "config.optimizer.eps='much' is of type str, not float"),
  ],
)
def test_a_config_json_gets_the_same_lines(field, value, why, tmp_path):
  values = json.loads(to_json(Config()))
  section, leaf = field.split(".")
  values[section][leaf] = value
  (tmp_path / "config.json").write_text(json.dumps(values))
  for script in (EVALUATE, GENERATE):
    line = one_line(*script[:-1], f"{script[-1]}={tmp_path}")
    assert f"{tmp_path}/config.json: {why}" in line
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def said(*arguments, script="train.py"):
  done = call(script, *arguments, imports_jax=False)
  assert done.returncode == 0 and not done.stderr, done.stderr
  return done.stdout


def test_help_lists_every_field():
  text = said("--help")
  assert "--workdir" in text and "Trains a model" in text
  for section in ("model", "model.moe", "data", "mesh"):
    assert f"\nconfig.{section}: " in text
  for name in field_names():
    assert f"\n  {name.rsplit('.', 1)[1]} = " in text, name
  assert "capacity_factor = 1.25 " in text and "inf is no limit" in text
  assert "top_k = 2" in said("--help", script="sweep.py")
  assert "top_k = 2" not in said("--help", script="eval.py")


def test_what_differs_from_the_defaults():
  arguments = "--diff", "--config=configs/debug.py", "--config.model.moe.capacity_factor=inf"
  text = "--config.data.name=text", "--config.data.path=x"
  lines = said(*arguments, "--config.model.moe.top_k=1", *text).splitlines()
  assert "config.model.moe.top_k = 1   (default 2)" in lines
  assert "config.model.moe.capacity_factor = inf   (default 1.25)" in lines
  assert "config.data.path = x   (default empty)" in lines
  assert "config.model.moe.num_experts = 4   (default 0)" in lines
  assert not any("qkv_bias" in line for line in lines)
  assert command_line.difference(Config()) == "every field has its default"


OVERRIDES = {
  "model.qkv_bias": True, "model.moe.router": Router.HASH, "loss.z": 1.0, "data.path": "a=b",
  "model.moe.capacity_factor": float("inf"), "train.steps": 2,
}  # fmt: skip


def test_overrides_are_spelled_as_in_train():
  """The last word of a field counts, and what is no override is left for the flags."""
  overrides, rest = command_line.take_overrides(
    [
      "sweep.py",
      "--config.model.qkv_bias=true",
      "--config.model.moe.router=hash",
      "--jobs=2",
      "-config.loss.z=1",
      "--config.data.path=a=b",
      "--config.model.moe.capacity_factor=inf",
      "--config.train.steps=1",
      "--config.train.steps=2",
    ]
  )
  assert rest == ["sweep.py", "--jobs=2"] and overrides == OVERRIDES


def test_overrides_become_words_again():
  config = override(Config(), OVERRIDES, "here")
  assert config.model.moe.router is Router.HASH and config.loss.z == 1.0
  assert command_line.words(Config(), config)[:2] == [
    "--config.model.qkv_bias=true",
    "--config.model.moe.router=hash",
  ]


@pytest.mark.parametrize(("argument", "why"), [
  ("--config.train.step=3", "nearest is config.train.steps"),
  ("--config.train.steps=many", "'many' is not of int"),
  ("--config.model.moe.router=best", "not of switch, topk"),
  ("--config.model.qkv_bias=1", "write --config.model.qkv_bias=true"),
  ("--config.train.steps", "write --config.train.steps=VALUE"),
])  # fmt: skip
def test_a_wrong_override_is_refused(argument, why):
  with pytest.raises(UserError, match=re.escape(argument) + ".*" + why):
    command_line.take_overrides([argument])


_PRINTS_THE_CACHE = """
import subprocess, sys
from moe_jax.start import command_line

def main():
  command_line.Parser("").read()
  code = "from moe_jax.storage import cache; print(cache.directory())"
  print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)

command_line.one_line_errors(main)
"""


def test_the_flag_names_the_cache_of_a_process_and_of_its_children(tmp_path):
  env = {**os.environ, "MOE_JAX_CACHE": str(tmp_path / "of_env"), "PYTHONPATH": str(ROOT)}
  done = python("-c", _PRINTS_THE_CACHE, "--cache_dir=c", cwd=tmp_path, env=env)
  assert done.stdout.strip() == str(tmp_path / "c"), done.stderr


def test_mixtral_counts():
  done = call("train.py", "--config=configs/mixtral_8x7b.py", "--describe")
  assert "46.7B total, 12.88B active" in done.stdout
