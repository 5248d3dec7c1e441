"""What moe_jax.load returns: parameters, ids, and the routing of a text, as evaluation has them."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.analysis import trace
from moe_jax.config import override
from moe_jax.errors import UserError
from moe_jax.moe import validation
from moe_jax.training.evaluator import Evaluator
from tests.support.oracle import softmax
from tests.support.scripts import checkpoint_of, python
from tests.support.toy_text import toy_rows
from tests.support.toys import mesh_of

TEXT = "def f(x):\n  return x\n\n\nclass A:\n  pass  # é"  # 44 bytes
LONG = "import os\n" * 20


@pytest.fixture(scope="module")
def model(whole_run):
  return moe_jax.load(whole_run.workdir)


def evaluation(model, text, factor, group=0):
  """The text as the one row of a split, and the config of its evaluation.

  The row is as long as the text, or is padded to whole groups.
  """
  ids_T = model.encode(text)
  size = group or len(ids_T)
  length = -(-len(ids_T) // size) * size
  rows = toy_rows([len(ids_T) - 1], [-1], domains=(), seq_len=length)
  stream_N = np.append(ids_T, model.tokenizer.separator)
  rows = dataclasses.replace(rows, stream_N=stream_N, tokenizer=model.tokenizer)
  config = override(model.config, {"data.seq_len": length, "model.moe.group_size": group})
  return rows, validation.at_capacity(config, factor) if factor else config


def test_a_program_that_imports_it_has_no_jax():
  done = python("-c", "import moe_jax, sys; assert 'jax' not in sys.modules")
  assert not done.returncode, done.stderr


def test_it_says_what_it_is(model):
  assert repr(model) == "<run at step 12: 39,584 parameters, 27,296 active for a token>"
  assert model.config.model.moe.bias_update_rate == 0.001 and model.config.train.steps == 12


def test_a_text_begins_as_a_document(model):
  ids_T = model.encode("é")
  assert ids_T.tolist() == [256, 0xC3, 0xA9] and ids_T.dtype == np.int64
  assert model.encode("").tolist() == [256] and model.tokenizer.decode(ids_T) == "é"


def test_the_parameters_are_those_of_the_checkpoint(model, whole_run):
  stored = checkpoint_of(whole_run.workdir, 12)
  block = stored["params"]["scans"]["0"]["blocks"]["0"]
  up_EDF = block["ffn"]["up_EDF"]
  up_EDF = up_EDF.get("value", up_EDF) if isinstance(up_EDF, dict) else up_EDF
  np.testing.assert_array_equal(model.params["layers/1/ffn/up_EDF"], up_EDF[1])
  np.testing.assert_array_equal(model.params["bias_ZE"], stored["bias_ZE"])
  assert len(model.params) == 2 * 10 + 3 and model.params["embed_VD"].shape == (264, 32)
  assert sum(x.size for n, x in model.params.items() if n != "bias_ZE") == 39_584


def test_the_first_layer_by_hand(model):
  """A token alone attends to itself: its attention is its value."""
  found, params = model.routing(""), model.params
  layer = {n.removeprefix("layers/0/"): x for n, x in params.items() if "layers/0/" in n}

  def norm(x_D, scale_D):
    return x_D / np.sqrt(np.mean(x_D**2) + model.model.norm_eps) * scale_D

  x_D = params["embed_VD"][256]
  v_GA = np.einsum("D,DGA->GA", norm(x_D, layer["attention_norm/norm_D"]), layer["attention/v_DGA"])
  v_HA = np.repeat(v_GA, 2, axis=0)
  x_D = x_D + np.einsum("HA,HAD->D", v_HA, layer["attention/out_HAD"])
  logits_E = norm(x_D, layer["ffn_norm/norm_D"]) @ layer["ffn/router_DE"]
  best_K = np.argsort(-(softmax(logits_E) + params["bias_ZE"][0]))[:2]
  gate_K = softmax(logits_E[best_K])
  order_K = np.argsort(-gate_K)
  assert found.expert_ZTK[0].tolist() == [best_K[order_K].tolist()]
  np.testing.assert_allclose(found.gate_ZTK[0, 0], gate_K[order_K], rtol=1e-5)
  assert found.tokens == ["<|begin|>"] and found.layers == [0, 1] and not found.dropped_ZTK.any()


@pytest.mark.parametrize("factor", [None, 1.0, 0.5, math.inf], ids=str)
def test_a_text_is_routed_as_eval_traces_it(factor, model):
  found = model.routing(TEXT, factor)
  rows, config = evaluation(model, TEXT, factor)
  restored = trace.RestoredModel(config.model, *model._stored)
  with jax.set_mesh(mesh_of()):
    traced = trace.collect(restored, rows, [0], 1, mesh_of())
  T, K, E = 45, 2, 4
  assert found.expert_ZTK.shape == found.gate_ZTK.shape == (2, T, K)
  assert (found.expert_ZTK.dtype, found.gate_ZTK.dtype) == (np.int32, np.float32)
  assert found.ids_T.tolist() == traced.token_T.tolist() and found.tokens[-2:] == ["\ufffd"] * 2
  assert (np.diff(found.gate_ZTK) <= 0).all()
  to_ZTKE = found.expert_ZTK[..., None] == np.arange(E)
  np.testing.assert_array_equal(to_ZTKE.any(axis=2), traced.routed_ZTE)
  kept_ZTE = (to_ZTKE & ~found.dropped_ZTK[..., None]).any(axis=2)
  np.testing.assert_array_equal(kept_ZTE, traced.kept_ZTE)
  gate_ZTE = (to_ZTKE * found.gate_ZTK[..., None]).sum(axis=2)
  np.testing.assert_allclose(gate_ZTE, traced.gate_ZTE, atol=1e-6)
  assert found.dropped_ZTK.any() == (factor in (0.5, 1.0))


# A group that is longer than the text has only the text in it. Of the last, the third is padding.
@pytest.mark.parametrize(
  ("text", "factor", "group", "size"),
  [(TEXT, 0.5, 0, 0), (LONG, 1.0, 0, 0), (TEXT, 0.5, 128, 0), (LONG, 1.0, 16, 16)],
)
def test_as_many_are_dropped_as_in_an_evaluation(text, factor, group, size, model, monkeypatch):
  rows, config = evaluation(model, text, factor, size)
  with jax.set_mesh(mesh_of()):
    evaluator = Evaluator(config, rows, mesh_of(), 0)
    result = evaluator.result(evaluator.total(*model._stored))
  fields = {"model.moe.group_size": group}
  monkeypatch.setattr(model, "config", override(model.config, fields))
  found = model.routing(text, factor)
  np.testing.assert_allclose(found.dropped_ZTK.mean(axis=(1, 2)), result["drop_fraction_Z"])
  assert 0 < found.dropped_ZTK.mean() < 0.8 and len(found.tokens) == len(text.encode()) + 1


@pytest.mark.slow
def test_a_mesh_routes_a_text_alike(model, whole_run, tmp_path):
  run = shutil.copytree(whole_run.workdir, tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["mesh"] |= {"data": 2, "expert": 4}
  config.pop("digest")
  (run / "config.json").write_text(json.dumps(config))
  other = moe_jax.load(run)
  one, eight = model.routing(TEXT, 0.5), other.routing(TEXT, 0.5)
  assert (model.mesh.size, other.mesh.size) == (1, 8) and one.dropped_ZTK.any()
  np.testing.assert_array_equal(one.expert_ZTK, eight.expert_ZTK)
  np.testing.assert_array_equal(one.dropped_ZTK, eight.dropped_ZTK)
  np.testing.assert_array_equal(
    model.params["layers/1/ffn/up_EDF"], other.params["layers/1/ffn/up_EDF"]
  )


def test_texts_of_one_bucket_share_a_program_where_nothing_drops(model):
  from moe_jax.inference import loaded

  before = loaded.choices._cache_size()
  for length in (130, 140, 250):
    model.routing("a" * length, math.inf)
  assert loaded.choices._cache_size() == before + 1


def test_what_has_no_answer_is_refused(model, monkeypatch):
  with pytest.raises(UserError, match=r"eval_capacity_factor=-1.* must be above 0"):
    model.routing("a", -1.0)
  monkeypatch.setattr(model, "config", override(model.config, {"model.moe.num_experts": 0}))
  with pytest.raises(UserError, match="num_experts=0, a dense model, routes nothing"):
    model.routing("a")
