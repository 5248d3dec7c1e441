"""What is refused of a program, with the real step on this machine's devices."""

import contextlib
import importlib.util

import jax
import pytest

from moe_jax.compile import programs, report, search, targets
from moe_jax.config import Remat, override
from moe_jax.errors import UserError
from moe_jax.kernels.chips import CHIPS
from moe_jax.model import transformer
from moe_jax.model.transformer import abstract_params
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


def test_a_step_is_read_and_reported_on_devices_that_are_here():
  """With the figures of another chip, so that the numbers can be worked out."""
  chip = CHIPS["h200"]
  target = targets.Target("toy", chip, "h200", (1, 2), 1)
  compiled = programs.compile_for(CONFIG, target, "train", print, [], jax.devices()[:2])
  found = report.as_json(compiled, target, "train")
  assert found["tokens"] == CONFIG.data.batch_size * CONFIG.data.seq_len
  state = sum(x.size * 4 for x in jax.tree.leaves(abstract_params(CONFIG.model)))
  assert 3 * state <= found["memory"]["arguments"] <= 4 * state
  seconds = found["seconds"]
  assert seconds["compute"] == pytest.approx(found["flops"]["executed"] / chip.flops)
  assert seconds["memory"] == pytest.approx(found["memory_bytes"] / chip.memory_speed)
  # Gradients are summed over `data`, and nothing else is moved but counts.
  sums = [c for c in found["collectives"] if c["axes"] == ("data",)]
  moved = sum(c["size"] * c["times"] for c in sums)
  assert state <= moved <= 1.5 * state and {c["kind"] for c in sums} == {"all-reduce"}
  wire = sum(c["wire_bytes"] for c in found["collectives"])
  assert seconds["network"]["data"] == pytest.approx(wire / chip.link, rel=0.2)
  work = max(seconds["compute"], seconds["memory"], sum(seconds["network"].values()))
  assert seconds["step"] == pytest.approx(work, rel=0.01)
  text = report.page(found)
  assert "MFU at most" in text and "2 slice" not in text and text.count("\n") < 30
  assert "chunks" not in text
  found["config"]["model.moe.exchange_chunks"] = 3
  assert "chunks         3 in turn, of which none overlaps: they gain no time" in report.page(found)


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
