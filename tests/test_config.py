"""Mistakes end in one line that names the field, the value and the remedy, and leave nothing."""

import dataclasses
import importlib
import subprocess
import sys

import pytest

from moe_jax import command_line, validation
from moe_jax import config as config_lib
from moe_jax.config import Dispatch, Exchange, Priority, Router, Score
from tests.support.toys import ROOT, toy_config

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name):
  return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_validates_and_survives_json(name):
  config = load(name)
  validation.validate(config)
  assert config_lib.from_json(config_lib.to_json(config)) == config
  doc = importlib.import_module(f"configs.{name}").__doc__
  for heading in ("Question", "Command", "Hardware", "Time", "Expect"):
    assert f"\n{heading}  " in doc, f"configs/{name}.py does not state {heading}"


def test_the_shipped_configs_are_there():
  expected = {"tiny_moe", "tiny_dense", "laptop_moe", "switch_small", "mixtral_small"}
  assert expected | {"mixtral_8x7b", "debug"} <= set(CONFIGS)


DISAGREEMENTS = {
  "model.num_kv_heads=3": "config.model.num_heads=4",
  "model.head_dim=5": "even",
  "model.moe.top_k=5": "config.model.moe.num_experts=4",
  "model.moe.top_k=1": "renormalize=false",
  "model.moe.router=switch": "top_k=1",
  "model.moe.dispatch=dense": "set capacity_factor=0",
  "model.moe.every=3": "config.model.num_layers=2",
  "model.moe.first_dense=2": "num_experts=0",
  "model.moe.group_size=4": "config.data.seq_len=9",
  "model.moe.jitter=1.5": "below 1",
  "mesh.expert=3": "config.model.moe.num_experts=4",
  "mesh.tensor=4": "config.model.num_kv_heads=2",
  "mesh.fsdp=4": "config.model.dim=10",
  "mesh.data=3": "config.data.batch_size=8",
  "train.accumulation=3": "config.data.batch_size=8",
  "train.steps=0": "at least 1",
  "optimizer.learning_rate=-1.0": "above 0",
  "optimizer.warmup_steps=11": "config.train.steps=10",
  "optimizer.b2=1.0": "below 1",
  "loss.load_balance=nan": "finite",
}


@pytest.mark.parametrize("change", DISAGREEMENTS)
def test_disagreeing_fields_are_named(change):
  config = toy_config()
  validation.validate(config)
  name, text = change.split("=")
  *path, leaf = name.split(".")
  section = config
  for part in path:
    section = getattr(section, part)
  setattr(section, leaf, type(getattr(section, leaf))(text))
  with pytest.raises(config_lib.UserError) as error:
    validation.validate(config)
  message = str(error.value)
  assert f"config.{name}=" in message and DISAGREEMENTS[change] in message and "\n" not in message


HASH = dict(router=Router.HASH, top_k=1, renormalize=False)
# fields of moe, fields of loss: (the two fields that disagree, why or what to do)
WRONG_ROUTINGS = [
  (HASH | dict(top_k=2), {}, "router", "top_k", "hashes to one expert"),
  (HASH, dict(load_balance=0.01), "router", "loss.load_balance", "set load_balance=0"),
  (dict(router=Router.NOISY_TOPK, top_k=4), {}, "router", "top_k", "lower top_k"),
  (dict(router=Router.EXPERT_CHOICE), {}, "router", "renormalize", "set renormalize=false"),
  (
    dict(router=Router.EXPERT_CHOICE, renormalize=False, eval_capacity_factor=0.0), {},
    "router", "eval_capacity_factor", "above 0",
  ),
  (
    dict(router=Router.EXPERT_CHOICE, renormalize=False, priority=Priority.SCORE), {},
    "router", "priority", "priority=token",
  ),
  (dict(router=Router.SINKHORN, score=Score.SIGMOID), {}, "router", "score", "router=topk"),
  (dict(router=Router.SINKHORN, bias_update_rate=0.1), {}, "router", "bias_update_rate", "topk"),
  (dict(router=Router.SINKHORN, expert_groups=2), {}, "router", "expert_groups", "groups=1"),
  (dict(expert_groups=4, top_groups=2), {}, "num_experts", "expert_groups", "two experts"),
  (dict(expert_groups=2, top_groups=3), {}, "top_groups", "expert_groups", "once"),
  (dict(expert_groups=2, top_k=3), {}, "top_k", "top_groups", "raise top_groups"),
  ({}, dict(load=0.1), "router", "loss.load", "set loss.load=0"),
  (dict(dispatch=Dispatch.GROUPED), {}, "capacity_factor", "dispatch", "set capacity_factor=0"),
  (dict(exchange=Exchange.RAGGED), {}, "exchange", "dispatch", "set exchange=auto"),
  (
    dict(dispatch=Dispatch.GROUPED, capacity_factor=0.0, eval_capacity_factor=0.0,
         exchange_factor=1.5), {},
    "exchange_factor", "exchange", "set exchange_factor=0",
  ),
]  # fmt: skip


@pytest.mark.parametrize(("moe", "loss", "first", "second", "text"), WRONG_ROUTINGS)
def test_routings_that_make_no_sense_are_refused(moe, loss, first, second, text):
  config = toy_config(**moe)
  config.loss = config_lib.Loss(**{"load_balance": 0.0} | loss)
  with pytest.raises(config_lib.UserError) as error:
    validation.validate(config)
  second = second if second.startswith("loss.") else f"model.moe.{second}"
  assert str(error.value).startswith(f"config.model.moe.{first}=")
  assert f"with config.{second}=" in str(error.value) and text in str(error.value)


def test_wrong_type_in_a_file():
  config = toy_config()
  config.model.moe.num_experts = "8"
  with pytest.raises(config_lib.UserError, match=r"config.model.moe.num_experts='8'.*str, not int"):
    validation.validate(config)


def test_mesh_must_match_the_devices():
  config = toy_config()
  config.mesh = config_lib.Mesh(expert=2)
  assert validation.resolve_mesh(config, 8).mesh.data == 4
  config.mesh = config_lib.Mesh(data=2, expert=2)
  with pytest.raises(config_lib.UserError, match=r"8 device.*XLA_FLAGS"):
    validation.resolve_mesh(config, 8)


def test_unknown_field_in_json():
  text = config_lib.to_json(toy_config()).replace('"top_k"', '"topk"')
  with pytest.raises(config_lib.UserError, match=r"topk; the nearest is config.model.moe.top_k"):
    config_lib.from_json(text)


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
  "--config.train.steps=1": "--config is missing before it",
  "--config=configs/debug.py --config=configs/tiny_moe.py": "--config is given twice",
  "": "--config is missing",
}


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_wrong_command_is_one_line_and_makes_nothing(arguments, tmp_path):
  lines = ["from moe_jax.config import Config, Model, MoE", "", "", "def get_config():"]
  typo = [*lines, "  return Config(model=Model(moe=MoE(num_expert=8)))"]
  (tmp_path / "typo.py").write_text("\n".join(typo))
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


@pytest.mark.parametrize("module", ["config", "command_line", "workdir", "report"])
def test_what_needs_no_jax(module):
  code = f"import sys; import moe_jax.{module}; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_mistake_is_told_before_a_device_is_touched():
  code = (
    "import sys; from moe_jax import config, validation; validation.validate(config.Config()); "
    "from jax._src import xla_bridge; sys.exit(xla_bridge.backends_are_initialized())"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_field_is_optional():
  for section in command_line.sections(config_lib.Config()):
    for field in dataclasses.fields(section[1]):
      assert isinstance(field.type, type), field


def test_mixtral_counts():
  done = subprocess.run(
    [sys.executable, "train.py", "--config=configs/mixtral_8x7b.py", "--describe"],
    cwd=ROOT, capture_output=True, text=True, timeout=100,
  )  # fmt: skip
  assert "46.70B total, 12.88B active" in done.stdout
