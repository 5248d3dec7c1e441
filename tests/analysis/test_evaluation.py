"""What eval.py says beyond the loss: domains, other capacities, the price of not seeing ahead."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.analysis import causal, evaluation, trace
from moe_jax.config import Dispatch, Exchange, Priority, Router, UserError
from moe_jax.data import pipeline, tokenizers
from moe_jax.model import transformer
from moe_jax.training import evaluator, losses, train
from tests.support.toys import ROOT, mesh_of, toy_config

S = 23  # the separator of a vocabulary of 24


def toy_rows(lengths, labels, domains=("a", "b"), seq_len=9):
  """Documents of random ids, of these lengths and domains; an id i stands for i % 3 bytes."""
  rng = np.random.default_rng(1)
  tokenizer = tokenizers.Tokenizer([b"xx"[: i % 3] for i in range(S)] + [b""], S, "toy")
  documents = [np.array([S, *rng.integers(0, S, length)]) for length in lengths]
  stream_N = np.concatenate([*documents, [S]])
  starts_M = np.cumsum([0, *map(len, documents[:-1])])
  return pipeline.Rows(
    stream_N=stream_N, seq_len=seq_len, tokenizer=tokenizer, num_documents=len(documents),
    num_bytes=1, digest="", domains=domains, starts_M=starts_M, domain_M=np.array(labels),
    source_M=np.arange(len(labels)),
  )  # fmt: skip


@pytest.fixture(scope="module")
def weights():
  """Of toy_config, with routers as uneven as learned ones; any routing can use them."""
  with jax.set_mesh(mesh_of()):
    init, _, _ = train.init_state(toy_config(), mesh_of())
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: np.asarray(leaf) * (30 if "router_DE" in str(path) else 1), init().params
    )


def toy_model(config, weights):
  return trace.Model(config.model, weights, np.zeros((2, 4), np.float32))


def read(model, batch):
  """Logits and statistics."""
  read = jax.jit(lambda *arrays: transformer.evaluate(model.config, *arrays))
  return read(model.params, model.bias_ZE, batch)


def test_cut_by_hand():
  row = pipeline.Batch(*(np.array([x], np.int32) for x in (
    [9, S, 1, 2, 3, 4], [S, 1, 2, 3, 4, 5], [1, 2, 2, 2, 2, 2], [0, 0, 1, 2, 3, 4])))  # fmt: skip
  other = row._replace(tokens_BL=np.array([[11, 12, 13, 14, S, 15]], np.int32))
  both = pipeline.Batch(*(np.concatenate([x, x, x]) for x in row))
  others = pipeline.Batch(*(np.concatenate([x, x, x]) for x in other))
  cut = causal.cut(both, others, np.array([2, 0, 5]), S)
  assert cut.tokens_BL.tolist() == [
    [9, S, 1, 14, S, 15], [9, 12, 13, 14, S, 15], [9, S, 1, 2, 3, 4]
  ]  # fmt: skip
  assert cut.segments_BL.tolist() == [
    [1, 2, 2, 3, 4, 4], [1, 2, 2, 2, 3, 3], [1, 2, 2, 2, 2, 2]
  ]  # fmt: skip
  assert cut.positions_BL.tolist() == [
    [0, 0, 1, 0, 0, 1], [0, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4]
  ]  # fmt: skip
  np.testing.assert_array_equal(cut.targets_BL, both.targets_BL)


DROPLESS = dict(dispatch=Dispatch.GROUPED)
CHOOSING = dict(router=Router.EXPERT_CHOICE, renormalize=False, eval_capacity_factor=1.0)


@pytest.mark.parametrize(
  ("fields", "is_causal"),
  [
    (dict(eval_capacity_factor=1.0), True),
    (dict(priority=Priority.CHOICE, eval_capacity_factor=1.0), False),
    pytest.param(DROPLESS, True, marks=pytest.mark.slow),
    pytest.param(dict(group_size=18, eval_capacity_factor=1.0), True, marks=pytest.mark.slow),
    pytest.param(CHOOSING | dict(group_size=18), False, marks=pytest.mark.slow),
  ],
)
def test_hiding_the_future_changes_what_depends_on_it(fields, is_causal, weights, one_device):
  """Bit for bit nothing where routing is causal."""
  config = toy_config(**fields)
  config.model.moe = evaluation.with_slots(config.model.moe)
  model, rows = toy_model(config, weights), toy_rows([30, 3, 17, 25], [0, 1, 0, 1])
  group_rows = max(config.model.moe.group_size // 9, 1)
  hidden_RL, forced_RL = causal.causal_losses(model, rows, [0, 2, 4, 6], 8, group_rows, mesh_of())
  np.testing.assert_array_equal(hidden_RL[:, -1], forced_RL[:, -1])  # nothing is left to hide
  assert (hidden_RL == forced_RL).all() == is_causal
  if not is_causal:
    assert np.abs(hidden_RL - forced_RL).max() > 1e-3
  assert forced_RL.min() > 0 and hidden_RL.min() > 0


def test_a_hidden_future_is_another_rows_text(weights, one_device):
  """One token's loss from one row that is put together by hand; experts choose, so it counts."""
  model, rows = toy_model(toy_config(**CHOOSING), weights), toy_rows([30, 30, 17], [0, 1, 0])
  hidden_RL, forced_RL = causal.causal_losses(model, rows, [1, 5], 8, 1, mesh_of())
  mine, other, t = rows.batch([1]), rows.batch([5]), 4
  assert (mine.segments_BL == 1).all() and (other.segments_BL == 1).all()  # no border inside
  column_L = np.arange(9)[None]
  put_together = pipeline.Batch(
    np.where(column_L <= t, mine.tokens_BL, other.tokens_BL), mine.targets_BL,
    np.where(column_L <= t, 1, 2).astype(np.int32),
    np.where(column_L <= t, column_L, column_L - t - 1).astype(np.int32),
  )  # fmt: skip
  both = pipeline.Batch(*(np.concatenate(pair) for pair in zip(put_together, mine, strict=True)))
  logits_BLV = np.asarray(read(model, both)[0], np.float64)
  for logits_V, found in zip(logits_BLV[:, t], (hidden_RL[0, t], forced_RL[0, t]), strict=True):
    nll = np.log(np.exp(logits_V).sum()) - logits_V[mine.targets_BL[0, t]]
    assert found == pytest.approx(nll, abs=1e-5)  # float32 rounding
  assert abs(hidden_RL[0, t] - forced_RL[0, t]) > 1e-3


def test_causal_numbers_and_too_little_text(weights, one_device):
  config, mesh = toy_config(), mesh_of()
  model = toy_model(config, weights)
  rows = toy_rows([30, 20], [0, 1])
  found = causal.measure(model, rows, config.model.moe, 3, 8, mesh)
  assert found["tokens"] == 3 * 9 and found["gap"] == 0.0
  assert found["loss"] == found["teacher_forced_loss"] > 0
  with pytest.raises(UserError, match="2 rows at least"):
    causal.measure(model, toy_rows([12], [0]), config.model.moe, 3, 8, mesh)


def test_loss_of_each_domain(weights, one_device):
  """Against sums over documents in Python; a document of no domain is in the whole alone."""
  config = toy_config()
  config.eval.batch_size = 4
  mesh, rows = mesh_of(), toy_rows([20, 3, 9, 14], [0, 1, -1, 0], domains=("a", "b", "never"))
  model = toy_model(config, weights)
  one = evaluator.Evaluator(config, rows, mesh, 0)
  total = one.total(model.params, model.bias_ZE, by_document=True)
  domains = one.by_domain(total.documents)
  assert list(domains) == ["a", "b"]
  # Nats of each target in the order of the stream; document d has lengths[d] + 1 of them.
  batch = rows.batch(range(len(rows)))
  logits_BLV = read(model, batch)[0]
  nll_N = np.asarray(losses.token_nll(logits_BLV, batch.targets_BL)[0])[batch.segments_BL > 0]
  targets_N = rows.stream_N[1:]
  pieces = np.split(np.arange(len(targets_N)), np.cumsum([21, 4, 10]))
  for name, members in {"a": [0, 3], "b": [1]}.items():
    where = np.concatenate([pieces[d] for d in members])
    num_bytes = sum(int(i) % 3 if i != S else 0 for i in targets_N[where])
    found = domains[name]
    assert (found["tokens"], found["bytes"]) == (len(where), num_bytes)
    assert found["loss"] == pytest.approx(nll_N[where].mean(), rel=1e-5)
    bits = nll_N[where].sum() / np.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
  assert (
    total.sums.targets == len(targets_N) == domains["a"]["tokens"] + domains["b"]["tokens"] + 10
  )


MESHES = [{}, pytest.param(dict(expert=4, data=2), marks=pytest.mark.slow)]


@pytest.mark.parametrize("axes", MESHES)
def test_trace_agrees_with_the_counters(axes, weights):
  """The counters of one device, on any mesh."""
  rows = toy_rows([30, 3, 17, 25, 9, 8], [0, 1, 0, 1, 1, 0])
  model = toy_model(toy_config(eval_capacity_factor=1.0), weights)
  batches = [rows.batch(numbers) for numbers in pipeline.eval_batches(range(len(rows)), 16)]
  assert len(batches) == 1 and not batches[0].segments_BL[-1].any()  # the last rows are padding
  with jax.set_mesh(mesh_of()):
    stats = read(model, batches[0])[1]
  mesh = mesh_of(**axes)
  with jax.set_mesh(mesh):
    choices = trace.compile_choices(model.config)
    found = trace.collect(choices, model, rows, list(range(len(rows))), 8, mesh)  # two batches
  assert found.token_T.tolist() == rows.stream_N[:-1].tolist()
  assert found.place_T.tolist() == [i % 9 for i in range(len(rows.stream_N) - 1)]
  assert found.row_T.tolist() == [i // 9 for i in range(len(rows.stream_N) - 1)]
  labels = np.repeat([0, 1, 0, 1, 1, 0], [31, 4, 18, 26, 10, 9])
  assert found.domain_T.tolist() == labels.tolist()
  np.testing.assert_array_equal(found.routed_ZTE.sum(axis=1), stats.routed_E)
  np.testing.assert_array_equal(found.kept_ZTE.sum(axis=1), stats.kept_E)
  np.testing.assert_allclose(found.gate_ZTE.sum(axis=1), stats.importance_E, rtol=1e-5)
  assert not found.kept_ZTE[~found.routed_ZTE].any()
  assert found.kept_ZTE.sum() < found.routed_ZTE.sum()


def test_other_capacities():
  dropless = toy_config(
    dispatch=Dispatch.GROUPED, exchange=Exchange.ALL_TO_ALL, exchange_factor=2.0
  )
  moe = evaluation.at_capacity(dropless, 1.5).model.moe
  assert (moe.dispatch, moe.eval_capacity_factor) == (Dispatch.GATHER, 1.5)
  assert evaluation.at_capacity(dropless, math.inf).model.moe.dispatch is Dispatch.GROUPED
  moe = evaluation.at_capacity(toy_config(dispatch=Dispatch.EINSUM), 0.5).model.moe
  assert (moe.dispatch, moe.eval_capacity_factor) == (Dispatch.EINSUM, 0.5)
  assert dropless.model.moe.dispatch is Dispatch.GROUPED  # the run's own config stays
  assert evaluation.with_slots(dropless.model.moe).eval_capacity_factor == math.inf


def test_what_has_no_meaning_is_refused():
  dense = toy_config(num_experts=0)
  evaluation.check(dense, [], False)
  for factors, routing, flag in (([1.0], False, "--capacity_factors"), ([], True, "--routing")):
    with pytest.raises(UserError, match=f"{flag}: config.model.moe.num_experts=0"):
      evaluation.check(dense, factors, routing)
  chosen = toy_config(router=Router.EXPERT_CHOICE, renormalize=False)
  chosen.loss.load_balance = 0.0
  evaluation.check(chosen, [0.5, 2.0], True)
  with pytest.raises(UserError, match="set a finite number"):
    evaluation.check(chosen, [math.inf], True)
  with pytest.raises(UserError, match="must be above 0; inf is no limit"):
    evaluation.check(toy_config(), [0.0], True)


def run(script, workdir, *arguments):
  done = subprocess.run(
    [sys.executable, script, f"--workdir={workdir}", *arguments],
    cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_trained_run_says_all_of_it(tmp_path):
  arguments = [
    "--config=configs/debug.py", "--config.data.name=python_domains",
    f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.train.keep_latest=3",
    "--config.train.steps=60", "--config.train.checkpoint_every=20", "--config.train.eval_every=60",
    "--config.eval.final_batches=40",
  ]  # fmt: skip
  assert run("train.py", tmp_path / "run", *arguments)[0] == 0
  flags = ("--routing", "--causal", "--capacity_factors=0.5,1,2,inf")
  code, said, error = run("eval.py", tmp_path / "run", *flags)
  assert code == 0, error
  for words in ("causal loss", "capacity factor 0.5", "repeats first", "domains apart", "bytecode"):
    assert words in said
  result, routing = (json.loads((tmp_path / "run" / n).read_text())
                     for n in ("eval.json", "routing.json"))  # fmt: skip
  assert list(result["domains"]) == ["code", "prose", "bytecode"]
  assert sum(d["tokens"] for d in result["domains"].values()) == result["tokens"] == 40 * 8 * 64
  weighted = sum(d["loss"] * d["tokens"] for d in result["domains"].values())
  assert weighted / result["tokens"] == pytest.approx(result["loss"], rel=1e-5)
  points = {point["capacity_factor"]: point for point in result["capacity"]}
  drops = [np.mean(points[factor]["drop_fraction_Z"]) for factor in (0.5, 1, 2)]
  assert drops[0] > drops[1] > drops[2] and np.mean(points["inf"]["drop_fraction_Z"]) == 0
  assert points[2]["loss"] == result["loss"]  # the run's own factor
  assert result["causal"]["gap"] == 0.0 and result["causal"]["tokens"] == 16 * 64
  assert result["flops_per_token"] > 6 * 10_000
  # Routing: shapes, shares and what it was traced from.
  assert routing["step"] == 60 and [p["step"] for p in routing["saturation"]] == [20, 40]
  assert routing["domains"] == ["code", "prose", "bytecode"] and routing["layers"] == [0, 1]
  for name, shape in (("domain_load_ZGE", (2, 3, 4)), ("position_load_ZPE", (2, 8, 4)),
                      ("class_load_ZCE", (2, 6, 4)), ("coactivation_ZEE", (2, 4, 4))):  # fmt: skip
    assert np.shape(routing[name]) == shape
  np.testing.assert_allclose(np.sum(routing["domain_load_ZGE"], axis=-1), 1, atol=1e-5)
  assert min(routing["domain_separation_Z"]) > 0 and max(routing["domain_separation_Z"]) < 1
  assert 16_000 < routing["tokens"] <= 16_384
  assert [routing["text"]["domain"].count(d) for d in routing["domains"]] == [200] * 3
  code, _, error = run("eval.py", tmp_path / "run", "--capacity_factors=1,x")
  assert code == 2 and error.count("\n") == 1
  assert "--capacity_factors=1,x: not a list of numbers" in error
