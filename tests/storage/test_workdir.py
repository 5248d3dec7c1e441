"""The files of a run: what is kept when it goes on, and what may not differ."""

import contextlib
import dataclasses
import json
import math
import operator
import re

import numpy as np
import pytest

from moe_jax.config import (
  Attention,
  Config,
  Data,
  Dispatch,
  Exchange,
  ExchangeFallback,
  GroupedMatmul,
  Health,
  Loss,
  Model,
  MoE,
  Remat,
  Train,
  override,
)
from moe_jax.config.run import to_json
from moe_jax.errors import DamagedError, StorageError, UserError
from moe_jax.moe import validation
from moe_jax.storage import files, workdir

UNLIMITED = math.inf  # capacity factor


def test_lines_after_the_resumed_step_go_and_so_does_a_cut_one(tmp_path):
  path = tmp_path / workdir.METRICS
  workdir.keep_lines(path, 3)  # of a run that has logged nothing
  for step in (1, 3, 4):
    workdir.append_line(path, {"step": step, "train/loss": step / 2})
  with path.open("a") as file:
    file.write('{"step": 2, "train/lo')
  assert [line["step"] for line in workdir.read_lines(path)] == [1, 3, 4]
  workdir.keep_lines(path, 3)
  kept = [json.loads(line) for line in path.read_text().splitlines()]
  assert kept == [{"step": 1, "train/loss": 0.5}, {"step": 3, "train/loss": 1.5}]


def test_an_object_comes_back_as_the_file_has_it(tmp_path):
  path = tmp_path / workdir.EVAL
  assert workdir.read_object(path) == {}
  written = workdir.write_object(path, {"loss": 1.5, "load_ZE": np.array([[1, 2]])})
  assert written == workdir.read_object(path) == {"loss": 1.5, "load_ZE": [[1, 2]]}
  path.write_text('{"loss": 1')
  with pytest.raises(DamagedError, match=r"eval.json is damaged .*; delete it and run eval.py"):
    workdir.read_object(path)


def check_same_config(folder, config):
  validation.check_same_config(folder, workdir.stored_config(folder), config)


@pytest.mark.parametrize("name", ["a[1]/run", "a]", "a*b", "a?b", "a\\b", "a\udcffb"])
def test_a_name_in_which_no_checkpoint_could_be_read_again_is_refused(name, tmp_path):
  (odd,) = set(name) & set("[*?\\\udcff") or "]"
  said = rf"^--workdir=.*{re.escape(repr(odd))} in its name, .*; name another folder$"
  for opened in (workdir.open_written, workdir.open_new):
    with pytest.raises(UserError, match=said):
      opened(tmp_path / name)
    assert opened(tmp_path / "a%20b #{1}") == tmp_path / "a%20b #{1}"


def test_kernels_are_remembered(tmp_path):
  assert workdir.read_kernels(tmp_path) == {}
  kernels = {"device": "cpu", "attention": "blocks", "grouped_matmul": "blocked"}
  workdir.write_object(tmp_path / workdir.KERNELS, kernels)
  assert workdir.read_kernels(tmp_path) == kernels
  assert (tmp_path / "kernels.json").is_file()


@pytest.mark.parametrize(
  "kernels",
  [
    {"attention": "blocks", "grouped_matmul": "auto"},
    {"device": "cpu", "attention": "fast", "grouped_matmul": "auto"},
    {"device": 1, "attention": "blocks", "grouped_matmul": "auto"},
  ],
)
def test_kernels_that_do_not_exist_are_one_line(kernels, tmp_path):
  (tmp_path / workdir.KERNELS).write_text(json.dumps(kernels))
  with pytest.raises(DamagedError, match=r"kernels.json is damaged .*; delete it"):
    workdir.read_kernels(tmp_path)


def test_a_run_goes_on_with_its_own_text_alone(tmp_path):
  workdir.check_same_data(tmp_path, {"train": "a"})  # a new run
  workdir.write_object(tmp_path / workdir.DATA, {"train": "a", "validation": "b"})
  workdir.check_same_data(tmp_path, {"validation": "b"})
  with pytest.raises(UserError, match="the validation text is not the one"):
    workdir.check_same_data(tmp_path, {"train": "a", "validation": "c"})


def test_a_run_goes_on_under_its_own_config_alone(tmp_path):
  config = Config()
  check_same_config(tmp_path, config)  # a new run
  workdir.write_config(tmp_path, config)
  longer = dataclasses.replace(config, train=Train(steps=7))
  check_same_config(tmp_path, longer)
  other = dataclasses.replace(config, loss=Loss(z=1.0))
  with pytest.raises(UserError, match=r"config.loss.z=1.0 \(was 0.0\)"):
    check_same_config(tmp_path, other)


@pytest.mark.parametrize(
  "field",
  [
    "model.num_layers",
    "data.batch_size",
    "data.seed",
    "optimizer.warmup_steps",
    "train.seed",
    "train.accumulation",
  ],
)
def test_what_changes_the_values_of_a_run_may_not_change(field, tmp_path):
  before = Config()
  after = override(before, {field: operator.attrgetter(field)(before) + 1})
  workdir.write_config(tmp_path, before)
  with pytest.raises(UserError, match=f"config.{field}="):
    check_same_config(tmp_path, after)


def _changed(**changes):
  """A dropless grouped model with some fields of the model or the MoE changed."""
  moe = MoE(
    num_experts=4,
    dispatch=Dispatch.GROUPED,
    capacity_factor=UNLIMITED,
    eval_capacity_factor=UNLIMITED,
  )
  fields = {f.name for f in dataclasses.fields(moe)}
  moe = dataclasses.replace(moe, **{n: v for n, v in changes.items() if n in fields})
  model = Model(moe=moe, **{n: v for n, v in changes.items() if n not in fields})
  return Config(model=model)


def test_no_character_of_a_config_changes_unnoticed(tmp_path):
  """And a file of before there were digests, or of one who has removed it, is read."""
  path = tmp_path / workdir.CONFIG
  workdir.write_config(tmp_path, Config())
  whole = path.read_text()
  assert workdir.read_config(tmp_path) == Config()
  for place in range(0, len(whole), 7):
    other = "7" if whole[place] in "01234568" else "_"
    path.write_text(whole[:place] + other + whole[place + 1 :])
    with contextlib.suppress(DamagedError, UserError):
      assert workdir.read_config(tmp_path) == Config(), whole[place - 30 : place]
  values = json.loads(whole)
  values["data"]["batch_size"] += 1
  path.write_text(json.dumps(values))
  with pytest.raises(DamagedError, match="if you changed it, remove its digest\\); put it back"):
    workdir.read_config(tmp_path)
  del values["digest"]
  path.write_text(json.dumps(values))
  assert workdir.read_config(tmp_path).data.batch_size == Data().batch_size + 1


def test_no_character_of_the_alarms_moves_the_data_unnoticed(tmp_path):
  path, line = tmp_path / workdir.ALARMS, {"step": 8, "alarm": "rewind", "next_batch": 11}
  path.write_text(json.dumps(line) + "\n")  # of before there were digests
  assert workdir.rewinds(tmp_path) == [line]
  path.unlink()
  for other in ({"step": 8, "alarm": "collapse"}, {"alarm": "rewind", "next_batch": "11"}):
    files.append_line(path, other)
  workdir.append_line(path, line)
  assert workdir.rewinds(tmp_path) == [files.sealed(line)]
  path.unlink()
  workdir.append_line(path, line)
  workdir.keep_lines(path, 8)
  whole = path.read_text()
  assert workdir.rewinds(tmp_path) == [files.sealed(line)]
  for place in range(len(whole) - 1):
    path.write_text(whole[:place] + ("7" if whole[place] != "7" else "1") + whole[place + 1 :])
    with contextlib.suppress(DamagedError):
      (found,) = workdir.rewinds(tmp_path)
      assert {name: found.get(name) for name in line} == line, whole[:place]


def test_what_changes_no_value_may_change(tmp_path):
  workdir.write_config(tmp_path, _changed())
  watched = dataclasses.replace(_changed(), health=Health(window=7, loss_spike=0.0))
  for config in (
    watched,
    _changed(remat=Remat.FULL),
    _changed(attention=Attention.REFERENCE),
    _changed(grouped_matmul=GroupedMatmul.RAGGED_DOT),
    _changed(exchange=Exchange.ALL_TO_ALL),
    *(_changed(dispatch=dispatch) for dispatch in Dispatch),  # nothing is dropped by any of them
  ):
    check_same_config(tmp_path, config)


def _refuses(path, field, **changes):
  with pytest.raises(UserError, match=rf"config\.model\.moe\.{field}=.* \(was "):
    check_same_config(path, _changed(**changes))


def test_dispatchers_that_drop_are_a_pair_and_so_are_those_that_do_not(tmp_path):
  limited = {"capacity_factor": 1.25, "eval_capacity_factor": 2.0}
  workdir.write_config(tmp_path, _changed(dispatch=Dispatch.GATHER, **limited))
  check_same_config(tmp_path, _changed(dispatch=Dispatch.EINSUM, **limited))
  for dispatch in (Dispatch.GROUPED, Dispatch.DENSE):
    _refuses(tmp_path, "dispatch", dispatch=dispatch, **limited)
  only_training = {"capacity_factor": UNLIMITED, "eval_capacity_factor": 2.0}
  workdir.write_config(tmp_path, _changed(dispatch=Dispatch.GATHER, **only_training))
  _refuses(tmp_path, "dispatch", dispatch=Dispatch.DENSE, **only_training)


def test_an_exchange_whose_buffers_can_overflow_stays(tmp_path):
  """What overflows is dropped, and all_to_all and ragged do not drop the same assignments."""
  buffers = {"exchange": Exchange.ALL_TO_ALL, "exchange_factor": 1.5}
  workdir.write_config(tmp_path, _changed(**buffers))
  _refuses(tmp_path, "exchange", **buffers | {"exchange": Exchange.RAGGED})
  _refuses(tmp_path, "exchange_factor", **buffers | {"exchange_factor": 0.0})
  _refuses(tmp_path, "exchange_chunks", **buffers | {"exchange_chunks": 2})
  exact = {"exchange_fallback": ExchangeFallback.EXACT}
  _refuses(tmp_path, "exchange_fallback", **buffers | exact)
  workdir.write_config(tmp_path, _changed(**buffers | exact))  # loses nothing, as any other does
  check_same_config(tmp_path, _changed(**buffers | exact | {"exchange_factor": 2.0}))
  check_same_config(tmp_path, _changed(exchange=Exchange.RAGGED, exchange_chunks=2))


def test_the_saved_steps_are_the_whole_checkpoints(tmp_path):
  assert workdir.saved_steps(tmp_path) == []
  for name in ("12", "4", "8.orbax-checkpoint-tmp"):
    (tmp_path / workdir.CHECKPOINTS / name).mkdir(parents=True)
  assert workdir.saved_steps(tmp_path) == [4, 12]
  assert workdir.is_trained(tmp_path, 12) and not workdir.is_trained(tmp_path, 8)


def test_a_folder_that_no_save_has_made_is_no_step(tmp_path):
  for name in ("007", "\u0663", "0", "10"):
    (tmp_path / workdir.CHECKPOINTS / name).mkdir(parents=True)
  assert workdir.saved_steps(tmp_path) == [0, 10]


@pytest.mark.parametrize(("name", "values"), [
  (workdir.SAVED, {"step": "8"}), (workdir.SAVED, {"stop": 8}), (workdir.SAVED, {"step": True}),
  (workdir.INIT, {"workdir": "a", "step": 8}),
  (workdir.INIT, {"workdir": 5, "step": 8, "optimizer": False}),
  (workdir.INIT, {"workdir": "a", "step": 8, "optimizer": False, "\u001b[31m": 1}),
])  # fmt: skip
def test_other_values_than_a_run_writes_are_one_line(name, values, tmp_path):
  (tmp_path / name).write_text(json.dumps(values))
  with pytest.raises(DamagedError, match=rf"{name} is damaged \(it has other values than .*step"):
    workdir.read_object(tmp_path / name)


def test_a_file_in_the_place_of_set_aside_is_one_line(tmp_path):
  (tmp_path / workdir.SET_ASIDE).touch()
  with pytest.raises(StorageError, match=r"cannot write .*set_aside: File exists"):
    workdir.set_aside(tmp_path, 8, "damaged")


def test_an_older_config_takes_defaults(tmp_path):
  values = json.loads(to_json(Config()))
  del values["optimizer"]["name"], values["health"]
  (tmp_path / workdir.CONFIG).write_text(json.dumps(values))
  assert workdir.read_config(tmp_path) == Config()
  check_same_config(tmp_path, Config())


OF_BEFORE = {  # a run's fields in a config.json without a format: how its command is spelled now
  "dropless": (
    dict(dispatch="grouped", capacity_factor=0.0, eval_capacity_factor=0.0),
    dict(dispatch=Dispatch.GROUPED),
  ),
  "no limit": (dict(capacity_factor=0.0), dict(capacity_factor=math.inf)),
  "top-1": (dict(top_k=1, renormalize=False), dict(top_k=1)),
}


@pytest.mark.parametrize("kind", OF_BEFORE)
def test_a_run_of_before_goes_on(kind, tmp_path):
  before, now = OF_BEFORE[kind]
  text = json.dumps({"model": {"moe": {"num_experts": 4} | before}})
  (tmp_path / workdir.CONFIG).write_text(text)
  workdir.read_config(tmp_path)
  config = override(Config(), {"model.moe": MoE(num_experts=4, **now)})
  check_same_config(tmp_path, config)
  config = override(
    config, {"model.moe.dispatch": Dispatch.EINSUM, "model.moe.capacity_factor": 1.5}
  )
  with pytest.raises(UserError, match=r"dispatch=einsum .*capacity_factor=1.5 \(was"):
    check_same_config(tmp_path, config)
