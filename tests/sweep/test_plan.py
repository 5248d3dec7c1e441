"""From a sweep file to runs: seeds, command lines, overrides, and one line for each mistake."""

import pathlib
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from moe_jax import command_line
from moe_jax import config as config_lib
from moe_jax.config import UserError
from tests.support.sweeps import TWO, make, write_sweep
from tests.support.toys import ROOT

SWEEPS = [p.stem for p in (ROOT / "configs/sweeps").glob("*.py") if "get_sweep" in p.read_text()]


def test_seeds_give_the_same_data_to_every_arm(tmp_path):
  plan = make(write_sweep(tmp_path, TWO))
  assert [(r.arm, r.seed) for r in plan.runs] == [
    (a, s) for a in ("base", "none") for s in (0, 1, 2)
  ]
  for run in plan.runs:
    assert run.config.train.seed == run.config.data.seed == run.seed
    assert run.workdir == f"{run.arm}/seed{run.seed}"
  assert plan.runs[1].config.data == plan.runs[4].config.data
  assert plan.question == "Is it so?\n\nWhy it could be."
  assert [a.overrides for a in plan.arms] == [{}, {"loss.load_balance": 0.0}]
  chosen = make(write_sweep(tmp_path, TWO), arms=["none"], seeds=[7])
  assert [(r.arm, r.seed) for r in chosen.runs] == [("none", 7)]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
def test_the_command_line_gives_the_same_config(tmp_path, monkeypatch):
  """A word of each kind: enum, bool, float, string with blanks, and the solved width."""
  arms = """[
    arm('k1', {'model.moe.router': 'switch', 'model.moe.top_k': 1, 'model.moe.renormalize': False,
               'optimizer.learning_rate': 1e-5, 'data.train_split': "train[:5%] & 'x' "}),
    arm('dense', {'model.qk_norm': True}, match('dense', by='flops_per_token')),
    arm('cosine', {'mesh.data': 1, 'data.text_field': ''})]"""
  plan = make(write_sweep(tmp_path, arms, evaluate=("--routing", "--split=test")), seeds=[0, 3])
  assert len(plan.runs) == 6
  for run in plan.runs:
    words = shlex.split(run.command)
    assert words[:3] == ["python", "train.py", "--config=configs/debug.py"]
    assert words[-1] == f"--workdir=runs/x/{run.workdir}"
    monkeypatch.setattr(sys, "argv", words[1:-1])  # where config_flags looks for the overrides
    values = flags.FlagValues()
    given = config_flags.DEFINE_config_file("config", flag_values=values)
    values(sys.argv)
    assert given.value == run.config
    asked = "--split=test" if run.arm == "dense" else "--routing --split=test"
    assert run.evaluate == f"python eval.py --workdir=runs/x/{run.workdir} {asked}"
  # Nothing but what differs: seed 0 is the base's.
  assert plan.runs[4].command == (
    "python train.py --config=configs/debug.py --config.data.text_field= --config.mesh.data=1 "
    "--workdir=runs/x/cosine/seed0"
  )


def test_overrides_win_over_the_arms_and_come_before_the_match(tmp_path):
  arms = "[arm('a', {'train.steps': 40}), arm('dense', match('dense', by='active_params'))]"
  plan = make(write_sweep(tmp_path, arms), overrides=["train.steps=20", "model.moe.expert_dim=90"])
  assert [a.config.train.steps for a in plan.arms] == [20, 20]
  assert plan.arms[1].config.model.ffn_dim == 181  # 2 * 90 + 4 / 3
  assert command_line.parse_overrides(
    ["model.qk_norm=true", "model.moe.router=hash", "loss.z=1", "data.path=a=b"]
  ) == {"model.qk_norm": True, "model.moe.router": config_lib.Router.HASH, "loss.z": 1.0,
        "data.path": "a=b"}  # fmt: skip
  for text, why in {
    "train.step=3": "nearest is config.train.steps", "train.steps=many": "'many' is not of int",
    "model.moe.router=best": "not of switch, topk", "model.qk_norm=1": "qk_norm=true",
    "train.steps": "write --override=train.steps=VALUE",
  }.items():  # fmt: skip
    with pytest.raises(UserError, match=why):
      command_line.parse_overrides([text])


SAME = "[arm('a', {'train.steps': 30}), arm('b')]"  # 30 is the base's
WRONG = {
  "[]": "arms is empty",
  "[arm('a'), arm('a', {'train.steps': 40})]": "two arms are called a",
  SAME: "the arms a and b are the same config",
  "[arm('a', {'loss.load_balanc': 0.0})]": "arm a: there is no field config.loss.load_balanc; the "
  "nearest is config.loss.load_balance",
  "[arm('a', {'train.seed': 3})]": "arm a: config.train.seed is the sweep's to set",
  "[arm('a', {'model.moe.top_k': 5})]": "arm a: config.model.moe.top_k=5 with",
  "[arm('a', {'train.steps': 'x'})]": "arm a: config.train.steps='x' is of type str, not int",
  "[arm('a', match('dense', by='size'))]": "sweep_file.py:9: match('dense', by='size'): `by` is",
  "[arm('a', {'model.moe.num_experts': 0}, match('dense', by='total_params'))]": "is dense already",
  "[1 / 0]": "sweep_file.py:9: ZeroDivisionError",
  "[arm('base')], target='bas'": "target=bas: no arm has that name; the nearest is base",
  "[arm('base')], seeds=(0, 0)": "seeds=(0, 0) must be different integers from 0 up",
  "[arm('base')], seeds=()": "seeds=() must be",
  "[arm('base')], evaluate='--routing'": "write ('--routing',)",
  "[arm('base')], base='configs/none.py'": "none.py: no such file",
}


@pytest.mark.parametrize("arms", WRONG)
def test_a_wrong_sweep_is_one_line(arms, tmp_path):
  path = write_sweep(tmp_path, arms)
  if "base=" in arms:
    text = pathlib.Path(path).read_text().replace('base="configs/debug.py", ', "")
    pathlib.Path(path).write_text(text)
  with pytest.raises(UserError) as error:
    make(path)
  assert WRONG[arms] in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_choice_is_one_line(tmp_path):
  path = write_sweep(tmp_path, TWO)
  with pytest.raises(UserError, match=r"--arms=nnoe: no arm has that name; the nearest is none"):
    make(path, arms=["nnoe"])
  with pytest.raises(UserError, match=r"no such file"):
    make("configs/sweeps/nothing.py")
  (tmp_path / "empty.py").write_text("def get_sweep():\n  return 3\n")
  with pytest.raises(UserError, match=r"returned int, not a Sweep"):
    make(str(tmp_path / "empty.py"))
  pathlib.Path(path).write_text(pathlib.Path(path).read_text().replace("'''", "#", 1).replace(
    "Why", "#").replace("'''", "#").replace("\n\n#", "\n#"))  # fmt: skip
  with pytest.raises(UserError, match=r"it has no docstring; begin with the question"):
    make(path)


@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_every_shipped_sweep_expands(name):
  plan = make(f"configs/sweeps/{name}.py")
  assert plan.sweep.band, "say what counts as an answer before the run"
  assert len({r.seed for r in plan.runs}) >= 3 or not plan.sweep.published
