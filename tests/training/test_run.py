"""What a run goes on from, and what it does after a step that is not finite: real small runs."""

import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import (
  Config,
  Data,
  Eval,
  Health,
  Model,
  MoE,
  OnNonfinite,
  Optimizer,
  Train,
  override,
)
from moe_jax.errors import DamagedError, UserError
from moe_jax.model import transformer
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import health, optimizers, replay
from moe_jax.training import run as run_lib
from moe_jax.training import setup as setup_lib
from tests.support.scripts import losses_of

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")
RARE = ord("Z")  # stands in one place of the text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("text") / "text", np.random.default_rng(0)
  folder.mkdir()
  for number in range(30):
    words = " ".join(rng.choice(WORDS, 60)) + "\n"
    if number == 10:
      words = words[:150] + "Z" + words[150:]
    (folder / f"{number}.txt").write_text(words)
  return folder


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
  monkeypatch.setenv("MOE_JAX_CACHE", str(cache))


def config_of(text, steps=40, every=8, **health):
  return Config(
    model=Model(
      num_layers=1,
      dim=8,
      num_heads=2,
      num_kv_heads=1,
      head_dim=4,
      ffn_dim=12,
      moe=MoE(num_experts=4, expert_dim=8, jitter=0.1),
    ),
    data=Data(name="text", path=str(text), seq_len=16, batch_size=8),
    optimizer=Optimizer(warmup_steps=0),
    train=Train(steps=steps, eval_every=every, checkpoint_every=every, log_every=1, keep_latest=9),
    eval=Eval(batches=1),
    health=Health(**health),
  )


@pytest.fixture
def nan_in_one_batch(monkeypatch):
  """A batch that has the rare byte gets a loss that is not a number."""
  real = transformer.target_nll

  def target_nll(model, params, bias_ZE, batch, key, *, train):
    found = real(model, params, bias_ZE, batch, key, train=train)
    has_it = jnp.any(jnp.where(batch.segments_BL > 0, batch.targets_BL, 0) == RARE)
    nll_BL = found.nll_BL / jnp.where(has_it, 0, 1) * jnp.where(has_it, 0, 1)
    return found._replace(nll_BL=nll_BL)

  monkeypatch.setattr(transformer, "target_nll", target_nll)


def alarms_of(workdir, kind):
  lines = workdir_lib.read_lines(workdir / workdir_lib.ALARMS)
  return [line for line in lines if line["alarm"] == kind]


def arrays_of(workdir, step):
  path = workdir / "checkpoints" / str(step) / "about/metadata"
  return json.loads(path.read_text())["about"]["arrays"]


def test_a_vocabulary_that_is_too_small_is_told_before_any_text_is_read(tmp_path):
  config = override(config_of(tmp_path / "no text"), {"model.vocab_size": 250})
  line = (
    "config.model.vocab_size=250 is less than the 257 of config.data.tokenizer=bytes; set it to "
    "257 or more"
  )
  with pytest.raises(UserError, match=f"^{line}$"):
    run_lib.run(setup_lib.prepare(config), str(tmp_path / "run"))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_skipped(text, tmp_path, nan_in_one_batch, capsys):
  """The state stays as it is, but for the number of steps; `--replay` sees the same batch."""
  workdir = tmp_path / "run"
  config = config_of(text, on_nonfinite=OnNonfinite.SKIP)
  run_lib.run(setup_lib.prepare(config), str(workdir))
  (skip,) = alarms_of(workdir, "skip")
  step = skip["step"]
  lines = {
    line["step"]: line
    for line in workdir_lib.read_lines(workdir / "metrics.jsonl")
    if "train/loss" in line
  }
  assert np.isnan(lines[step]["train/loss"]) and np.isfinite(lines[step + 1]["train/loss"])
  assert [lines[s]["train/skipped_updates"] for s in (step - 1, step, 40)] == [0, 1, 1]
  norms = [lines[s]["train/param_norm"] for s in (step - 1, step + 1)]
  assert norms[0] != norms[1] and np.isfinite(norms).all()
  assert workdir_lib.saved_steps(workdir) == [8, 16, 24, 32, 40]
  capsys.readouterr()
  before = sorted((p.name, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
  replay.replay(
    setup_lib.prepare(config_of(text, on_nonfinite=OnNonfinite.SKIP)), str(workdir), step
  )
  said = capsys.readouterr().out
  assert f"rows of the split   {', '.join(map(str, skip['rows']))}\n" in said
  assert "not finite          loss, " in said or "not finite          grad_norm" in said
  assert "first of it         invalid value (nan) encountered in" in said, said
  assert before == sorted((p.name, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
  replay.replay(
    setup_lib.prepare(config_of(text, on_nonfinite=OnNonfinite.SKIP)), str(workdir), step - 1
  )
  assert "nothing: all metrics are finite" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rewind_goes_past_the_rows_and_can_be_killed(text, tmp_path, nan_in_one_batch):
  """After a rewind to step 8 k the run trains as if the batches up to the bad one did not exist."""
  workdir = tmp_path / "run"
  config = config_of(text, on_nonfinite=OnNonfinite.REWIND)
  run_lib.run(setup_lib.prepare(config), str(workdir))
  (rewind,) = alarms_of(workdir, "rewind")
  to, bad = rewind["step"], rewind["next_batch"]
  assert to % 8 == 0 and to < bad <= to + 8 and not alarms_of(workdir, "nonfinite")
  assert f"rewind 1 of 3, to step {to}, and on from batch {bad}" in rewind["message"]
  losses_read = losses_of(workdir)
  assert sorted(losses_read) == list(range(1, 41)) and np.isfinite(list(losses_read.values())).all()
  # The same from that step on, in a second process' place: the line says where the data go on.
  other = tmp_path / "other"
  shutil.copytree(workdir, other)
  run_lib.run(setup_lib.prepare(config), str(other), resume_step=to)
  assert arrays_of(other, 40) == arrays_of(workdir, 40) and losses_of(other) == losses_read
  assert len(alarms_of(other, "rewind")) == 1


@pytest.mark.slow
def test_too_many_rewinds_end_the_run(text, tmp_path, monkeypatch):
  """A model that is broken for good is broken after a rewind, too."""
  config = override(
    config_of(text, steps=16, on_nonfinite=OnNonfinite.REWIND, rewind_limit=2),
    {"optimizer.learning_rate": 1e38},
  )
  with pytest.raises(
    health.NotFiniteAlarm, match=r"after config.health.rewind_limit=2 rewinds; low"
  ):
    run_lib.run(setup_lib.prepare(config), str(tmp_path / "run"))
  assert len(alarms_of(tmp_path / "run", "rewind")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("action", [OnNonfinite.WARN, OnNonfinite.OFF])
def test_no_state_that_is_not_finite_replaces_a_good_one(action, text, tmp_path):
  """`warn` goes on, and the checkpoints of before stay the newest ones."""
  workdir = tmp_path / "run"
  config = override(
    config_of(text, steps=16, every=4, on_nonfinite=action), {"train.keep_latest": 1}
  )
  run_lib.run(setup_lib.prepare(config_of(text, steps=4, every=4)), str(workdir))
  shutil.copy(workdir / "config.json", tmp_path / "kept.json")
  config = override(config, {"optimizer.learning_rate": 1e38})
  workdir_lib.write_config(workdir, config)
  with pytest.raises(
    health.NotFiniteAlarm, match="state of step 16 is not finite, so it is not sav"
  ):
    run_lib.run(setup_lib.prepare(config), str(workdir))
  assert workdir_lib.saved_steps(workdir) == [4]
  assert len(alarms_of(workdir, "nonfinite")) == (action is OnNonfinite.WARN)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory, cache):
  """A run of 8 steps with the checkpoints 4 and 8; its copies are changed."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MOE_JAX_CACHE", str(cache))
    run_lib.run(setup_lib.prepare(config_of(text, steps=8, every=4)), str(workdir))
  return workdir


def copy_of(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  return tmp_path / "run"


def refused(text, workdir, said, kind=DamagedError, **options):
  with pytest.raises(kind, match=said):
    run_lib.run(setup_lib.prepare(config_of(text, steps=12, every=4)), str(workdir), **options)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(text, trained, tmp_path):
  workdir = copy_of(trained, tmp_path)
  shutil.rmtree(workdir / "checkpoints/8")
  refused(text, workdir, r"has saved step 8, but of its checkpoints only \[4\] is there; .*=4")
  shutil.rmtree(workdir / "checkpoints")
  refused(text, workdir, "has saved step 8, but of its checkpoints none is there; .*=0")
  (workdir / "saved.json").unlink()
  refused(text, workdir, "has metrics up to step 8 and no checkpoint; .*--resume_step=0")
  (workdir / "metrics.jsonl").unlink()
  refused(text, workdir, "has config.json and no checkpoint; .*--resume_step=0")
  refused(text, workdir, "--resume_step=8: no such checkpoint; there are", UserError, resume_step=8)
  run_lib.run(setup_lib.prepare(config_of(text, steps=1, every=4)), str(workdir), resume_step=0)
  assert workdir_lib.saved_steps(workdir) == [1]


@pytest.mark.slow
def test_a_run_goes_on_from_the_step_that_is_asked_for(text, trained, tmp_path, capfd):
  workdir = copy_of(trained, tmp_path)
  run_lib.run(setup_lib.prepare(config_of(text, steps=8, every=4)), str(workdir), resume_step=4)
  said = capfd.readouterr()
  assert "resuming" in said.out and "checkpoint 8 is set aside" in said.err
  assert losses_of(workdir) == losses_of(trained)
  assert arrays_of(workdir, 8) == arrays_of(trained, 8)
  assert (workdir / "set_aside/8.0").is_dir()


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_says_so(text, tmp_path, trained, capsys):
  workdir = copy_of(trained, tmp_path)
  shutil.rmtree(workdir / "checkpoints")
  workdir_lib.record_saved(workdir, 0)
  workdir_lib.keep_lines(workdir / "metrics.jsonl", 3)
  run_lib.run(setup_lib.prepare(config_of(text, steps=8, every=4)), str(workdir))
  assert (
    "begins again at step 0: it ended after step 3, before its first" in capsys.readouterr().out
  )
  assert losses_of(workdir) == losses_of(trained)


@pytest.mark.slow
def test_a_step_that_was_due_an_evaluation_gets_it_when_the_run_goes_on(text, tmp_path):
  """A run that is asked to stop saves at once; its validation line is written by the next start."""
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  config = override(config_of(text, steps=8, every=8), {"train.eval_every": 2})
  run_lib.run(setup_lib.prepare(config), str(whole))

  class StopsAtFour(run_lib.Loop):
    def _should_stop(self, step):
      return step == 4

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib, "Loop", StopsAtFour)
    run_lib.run(setup_lib.prepare(config), str(parts))
  lines = workdir_lib.read_lines(parts / "metrics.jsonl")
  assert workdir_lib.saved_steps(parts) == [4] and "validation/loss" not in lines[-1]
  run_lib.run(setup_lib.prepare(config), str(parts))

  def validation(workdir):
    lines = workdir_lib.read_lines(workdir / "metrics.jsonl")
    return {line["step"]: line for line in lines if "validation/loss" in line}

  assert validation(parts) == validation(whole) and sorted(validation(whole)) == [2, 4, 6, 8]
  assert arrays_of(parts, 8) == arrays_of(whole, 8)


def test_a_signal_in_a_validation_ends_it_and_two_at_once_are_one(text, tmp_path, monkeypatch):
  """The step is saved at once, and evaluated by the next start that is not asked to stop too."""
  real, read, workdir = run_lib.pipeline.eval_batches, [], tmp_path / "run"

  def eval_batches(*arguments):
    for batch in real(*arguments):
      read.append(batch)
      if len(read) in (2, 4):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
      yield batch

  monkeypatch.setattr(run_lib.pipeline, "eval_batches", eval_batches)
  config, evaluated = config_of(text, steps=6, every=3), []
  # step 3 is evaluated because it is saved
  config = override(config, {"train.eval_every": 6, "eval.batches": 3})
  for saved in ([3], [3], [3, 6]):
    run_lib.run(setup_lib.prepare(config), str(workdir))
    assert workdir_lib.saved_steps(workdir) == saved
    lines = workdir_lib.read_lines(workdir / workdir_lib.METRICS)
    evaluated.append([line["step"] for line in lines if "validation/loss" in line])
  assert evaluated == [[], [], [3, 6]] and len(read) == 2 + 2 + 3 + 3


@pytest.mark.parametrize(
  "name",
  [
    "checkpoints",
    "checkpoints/deleted",
    "checkpoints/4",
    "tensorboard",
    "metrics.jsonl",
    "profile",
    "profile/plugins/profile",
    "alarms.jsonl",
  ],
)
def test_no_run_writes_or_deletes_through_a_link(name, text, trained, tmp_path):
  workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
  shutil.copytree(trained, workdir)
  (workdir / name).parent.mkdir(parents=True, exist_ok=True)
  if (workdir / name).exists():
    (workdir / name).rename(elsewhere)
  else:
    (elsewhere / "mine").mkdir(parents=True)
  (workdir / name).symlink_to(elsewhere)
  before = sorted(elsewhere.rglob("*"))
  refused(text, workdir, f"{name} is a symbolic link, and a run writes through none", UserError)
  assert sorted(elsewhere.rglob("*")) == before


def test_the_rows_that_are_named_are_those_of_the_batch(text):
  rows = run_lib.pipeline.load_rows(config_of(text).data, "train")
  batches = run_lib.pipeline.train_iterator(rows, config_of(text).data)
  run_lib.pipeline.skip_to(batches, 5)
  assert run_lib.pipeline.next_number(batches) == 5
  for number in (5, 6, 7):
    want = rows.batch(run_lib.pipeline.batch_rows(rows, config_of(text).data, number))
    jax.tree.map(np.testing.assert_array_equal, next(batches), want)


@pytest.mark.slow
def test_more_steps_move_the_schedule_and_the_start_says_so(text, tmp_path, capsys):
  said = []
  for steps in (8, 16, 16):
    config = config_of(text, steps)
    run_lib.run(setup_lib.prepare(config), str(tmp_path))
    said.append([x for x in capsys.readouterr().out.splitlines() if "moves the schedule" in x])
  new, old = optimizers.schedule(config.optimizer, 16)(8), config.optimizer.final_fraction
  assert said == [
    [],
    [
      "config.train.steps=16 (was 8) moves the schedule: the learning rate of step 9 is "
      f"{new:.3g}, and was {config.optimizer.learning_rate * old:.3g}"
    ],
    [],
  ]
