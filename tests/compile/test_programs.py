"""What is refused of a program, with the real step on this machine's devices."""

import contextlib
import importlib.util

import jax
import pytest

from moe_jax.compile import programs, search
from moe_jax.config import Remat, override
from moe_jax.errors import UserError
from moe_jax.model import transformer
from moe_jax.training import step as step_lib
from tests.support import scripts
from tests.support.toys import ROOT, mesh_of, toy_config

CONFIG = override(toy_config(), {"mesh.data": 2, "model.remat": Remat.DOTS})


def memory_of_step():
  """The memory of a toy's step, compiled for two devices of a CPU."""
  mesh = mesh_of(data=2)
  with jax.set_mesh(mesh):
    traced, _ = programs.train_step(CONFIG, mesh)
    return programs.memory_of(traced.lower().compile())


def test_a_step_that_lost_its_donation_is_refused(monkeypatch):
  programs.check_donation(memory_of_step(), "train")
  real = step_lib.compile_step
  monkeypatch.setattr(step_lib, "compile_step", lambda setup: real(setup, donate=False))
  with pytest.raises(UserError, match="a donation is lost"):
    programs.check_donation(memory_of_step(), "train")


def test_a_remat_policy_that_names_nothing_is_refused(monkeypatch):
  programs.check_remat(CONFIG)
  programs.check_remat(override(CONFIG, {"model.remat": Remat.NONE}))
  everything = jax.checkpoint_policies.everything_saveable
  monkeypatch.setitem(transformer.REMAT_POLICIES, Remat.DOTS, everything)
  from moe_jax.model import cost

  cost.activation_bytes.cache_clear()
  with contextlib.ExitStack() as stack:
    stack.callback(cost.activation_bytes.cache_clear)
    with pytest.raises(UserError, match=r"config\.model\.remat=dots .* does nothing"):
      programs.check_remat(CONFIG)


def result(remat, peak):
  return {"config": {"model.remat": remat, "mesh.data": 2}, "memory": {"peak": peak}}


def test_two_policies_of_equal_compiled_memory_are_refused():
  search.check_remat([result("full", 2**30), result("dots", 2**31)])
  with pytest.raises(UserError, match="full and dots need the same 1"):
    search.check_remat([result("full", 2**30), result("dots", 2**30)])


def command(*words):
  return scripts.python("-m", "moe_jax.compile", *words, cwd=ROOT)


@pytest.mark.parametrize(
  ("words", "said"),
  [
    ([], "--config and --topology are needed"),
    (["--config=configs/debug.py", "--topology=v5p-7"], "--topology=v5p-7: no such slice"),
    (["--config=configs/debug.py", "--topology=v5p", "--search", "--chips=7"], "no such slice"),
    (["--config=configs/debug.py", "--topology=h200-8", "--mode=serve"], "invalid choice"),
  ],
)
def test_a_mistake_is_one_line(words, said):
  done = command(*words)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_a_compiler_that_is_missing_is_named():
  done = command("--config=configs/debug.py", "--topology=v5p-8")
  assert done.returncode == 2 and "pip install -e '.[tpu]'" in done.stderr.splitlines()[-1], done
