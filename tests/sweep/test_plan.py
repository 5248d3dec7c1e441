"""From a sweep file to runs: seeds, command lines, overrides, and one line for each mistake."""

import pathlib
import shlex

import pytest

from moe_jax.config import override
from moe_jax.errors import UserError
from moe_jax.start import command_line
from tests.support.sweeps import TWO, make, write_sweep
from tests.support.toys import ROOT, slow_unless

SWEEPS = [p.stem for p in (ROOT / "configs/sweeps").glob("*.py")]


def test_every_arm_runs_every_seed_in_a_workdir_of_its_own(tmp_path):
  plan = make(write_sweep(tmp_path, TWO))
  assert plan.question == "Is it so?\n\nWhy it could be."  # the docstring
  assert [a.overrides for a in plan.arms] == [{}, {"loss.load_balance": 0.0}]
  runs = plan.runs
  assert [(r.arm, r.seed) for r in runs] == [(a, s) for a in ("base", "none") for s in (0, 1, 2)]
  for run in runs:
    assert run.config.train.seed == run.config.data.seed == run.seed
    assert run.workdir == f"{run.arm}/seed{run.seed}"
  assert runs[1].config.data == runs[4].config.data  # of the same seed


def test_arms_and_seeds_can_be_chosen(tmp_path):
  chosen = make(write_sweep(tmp_path, TWO), arms=["none"], seeds=[7])
  assert [(r.arm, r.seed) for r in chosen.runs] == [("none", 7)]


# A word of each kind: enum, bool, float, inf, string with blanks, and the solved width.
WORDS = """[
    arm('k1', {'model.moe.router': 'switch', 'model.moe.top_k': 1,
               'model.moe.capacity_factor': float('inf'),
               'optimizer.learning_rate': 1e-5, 'data.train_split': "train[:5%] & 'x' "}),
    arm('dense', {'model.qkv_bias': True}, match('dense', by='flops_per_token')),
    arm('cosine', {'mesh.data': 1, 'data.column': ''})]"""
RUNS = [(name, seed) for name in ("k1", "dense", "cosine") for seed in (0, 3)]


@pytest.fixture(scope="module")
def words_plan(tmp_path_factory):
  path = write_sweep(
    tmp_path_factory.mktemp("words"), WORDS, evaluate=("--routing", "--split=test")
  )
  return make(path, seeds=[0, 3])


@pytest.fixture(params=RUNS, ids=str)
def words_run(request, words_plan):
  assert [(r.arm, r.seed) for r in words_plan.runs] == RUNS
  return words_plan.runs[RUNS.index(request.param)]


def test_the_command_line_gives_the_same_config(words_run):
  words = shlex.split(words_run.command)
  assert words[:3] == ["python", "train.py", "--config=configs/debug.py"]
  assert words[-1] == f"--workdir=runs/x/{words_run.workdir}"
  overrides, rest = command_line.take_overrides(words[3:-1])
  config = command_line.load_file("configs/debug.py")
  assert not rest and override(config, overrides) == words_run.config


def test_a_dense_arm_is_evaluated_without_options_about_experts(words_run):
  options = "--split=test" if words_run.arm == "dense" else "--routing --split=test"
  assert words_run.evaluate == f"python eval.py --workdir=runs/x/{words_run.workdir} {options}"


def test_the_command_line_names_nothing_but_what_differs(words_plan):
  """Seed 0 is the base's."""
  assert words_plan.runs[4].command == (
    "python train.py --config=configs/debug.py --config.data.column= --config.mesh.data=1 "
    "--workdir=runs/x/cosine/seed0"
  )


def test_overrides_win_over_the_arms_and_come_before_the_match(tmp_path):
  arms = "[arm('a', {'train.steps': 40}), arm('dense', match('dense', by='active_params'))]"
  plan = make(
    write_sweep(tmp_path, arms), overrides={"train.steps": 20, "model.moe.expert_dim": 90}
  )
  assert [a.config.train.steps for a in plan.arms] == [20, 20]
  assert plan.arms[1].config.model.ffn_dim == 181  # 2 * 90 + 4 / 3


SAME = "[arm('a', {'train.steps': 30}), arm('b')]"  # 30 is the base's
WRONG = {
  "[]": "arms is empty",
  "[arm('a'), arm('a', {'train.steps': 40})]": "two arms are called a",
  SAME: "the arms a and b are the same config",
  "[arm('a', {'loss.load_balanc': 0.0})]": "arm a: there is no field config.loss.load_balanc; the "
  "nearest is config.loss.load_balance",
  "[arm('a', {'train.seed': 3})]": "arm a: the sweep sets config.train.seed",
  "[arm('a', {'model.moe.top_k': 5})]": "arm a: config.model.moe.top_k=5 with",
  "[arm('a', {'train.steps': 'x'})]": "arm a: config.train.steps='x' is of type str, not int",
  "[arm('a', match('dense', by='size'))]": "sweep_file.py:9: match('dense', by='size'): `by` is",
  "[arm('a', {'model.moe.num_experts': 0}, match('dense', by='total_params'))]": "is dense already",
  "[1 / 0]": "sweep_file.py:9: ZeroDivisionError",
  "[arm('base')], target='bas'": "target=bas: no arm has that name; the nearest is base",
  "[exit(3)]": "sweep_file.py:9: SystemExit: 3",
  "[arm('base')], seeds=(0, 0)": "seeds=(0, 0) must be different integers from 0 to 4294967295",
  "[arm('base')], seeds=(2**32,)": "seeds=(4294967296,) must be different integers from 0 to",
  "[arm('base')], seeds=()": "seeds=() must be",
  "[arm('base')], evaluate='--routing'": "write ('--routing',)",
  "['base']": "arms=['base'] is not a list of Arm",
  "(arm(name) for name in 'ab')": "is not a list of Arm",
  "[arm('base')], seeds=3": "seeds=3 is not a list of int; write (3,)",
  "[arm('base')], evaluate=(3,)": "evaluate=(3,) is not a list of str",
  "[arm('base')], target=3": "target=3 is not a text",
  "[arm('base')], published=None": "published=None is not a text",
  "[arm('a', {3: 4})]": "arm a: {3: 4} is neither",
  "[arm('a', lambda config: None)]": "arm a: its transform returned None, not a Config",
  "[arm('a', lambda config: 1 / 0)]": "arm a: its transform ended with ZeroDivisionError: division",
  "[arm('base')], base='configs/none.py'": "none.py: no such file",
}


@pytest.mark.parametrize("arms", WRONG)
def test_a_wrong_sweep_is_refused_in_one_line(arms, tmp_path):
  path = write_sweep(tmp_path, arms)
  if "base=" in arms:
    text = pathlib.Path(path).read_text().replace('base="configs/debug.py", ', "")
    pathlib.Path(path).write_text(text)
  with pytest.raises(UserError) as error:
    make(path)
  assert WRONG[arms] in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_arm_and_a_missing_file_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"--arms=nnoe: no arm has that name; the nearest is none"):
    make(write_sweep(tmp_path, TWO), arms=["nnoe"])
  with pytest.raises(UserError, match=r"no such file"):
    make("configs/sweeps/nothing.py")


def test_a_file_that_returns_no_sweep_is_refused(tmp_path):
  (tmp_path / "empty.py").write_text("def get_sweep():\n  return 3\n")
  with pytest.raises(UserError, match=r"returned int, not a Sweep"):
    make(str(tmp_path / "empty.py"))


def test_a_sweep_without_a_docstring_is_refused(tmp_path):
  path = pathlib.Path(write_sweep(tmp_path, TWO))
  path.write_text(
    path.read_text()
    .replace("'''", "#", 1)
    .replace("Why", "#")
    .replace("'''", "#")
    .replace("\n\n#", "\n#")
  )
  with pytest.raises(UserError, match=r"it has no docstring; begin with the question"):
    make(str(path))


@pytest.mark.parametrize("name", slow_unless(["balance"], sorted(SWEEPS)))
def test_every_shipped_sweep_expands(name):
  plan = make(f"configs/sweeps/{name}.py")
  assert plan.sweep.band, "say what counts as an answer before the run"
  assert len({r.seed for r in plan.runs}) >= 3 or not plan.sweep.published
