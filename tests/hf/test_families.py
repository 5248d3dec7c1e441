"""Every family against transformers: files written there are read here, and the other way."""

import functools
import inspect

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_jax import sharding
from moe_jax.config import Mesh, Score
from moe_jax.hf import check, exporting, importing, layout, parts
from moe_jax.inference import decoding, generate
from moe_jax.model import pattern, transformer
from moe_jax.moe.balance import balance_loss
from tests.support import hf_models
from tests.support.hf_models import CONFIGS, torch, transformers
from tests.support.toys import mesh_of, slow_unless, tokens_of


class Pair:
  """A model of transformers, and ours read from its files."""

  def __init__(self, name, folder):
    self.peer = hf_models.build(name, folder)
    self.made = importing.plan(str(folder), Mesh(data=1))
    self.model = self.made.config.model
    self.mesh = mesh_of()
    with jax.set_mesh(self.mesh):
      self.weights = importing.read_weights(self.made, self.mesh)

  @functools.cached_property
  def ours(self):
    """(what the forward pass gives for the tokens, gradients): one program for all tests."""

    @jax.jit
    def both(params, cotangent_BLV):
      def logits(params):
        out = transformer.forward(
          self.model,
          params,
          self.weights.bias_ZE,
          tokens_of(hf_models.tokens()),
          jax.random.key(0),
          train=True,
          trace=True,
        )
        return out.logits_BLV, out

      _, pull, out = jax.vjp(logits, params, has_aux=True)
      return out, pull(cotangent_BLV)[0]

    with jax.set_mesh(self.mesh):
      return both(self.weights.params, cotangent())

  @functools.cached_property
  def streams(self):
    with jax.set_mesh(self.mesh):
      return check.streams(self.made, self.weights, hf_models.tokens()[0])

  @functools.cached_property
  def their_streams(self):
    return check.theirs(self.peer.folder, hf_models.tokens()[0])


@pytest.fixture(scope="module", params=slow_unless(["glm4_moe"], CONFIGS))
def pair(request, tmp_path_factory):
  return Pair(request.param, tmp_path_factory.mktemp(request.param) / "theirs")


def cotangent():
  ids_BL = hf_models.tokens()
  return np.random.default_rng(4).normal(size=(*ids_BL.shape, 37)).astype(np.float32)


def close(got, want, what="", tolerance=1e-5):
  want = np.asarray(want)
  largest = np.abs(want).max()
  assert largest > 1e-3, f"{what} is zero on both sides"
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * largest, err_msg=what)


def test_logits_and_gradients(pair):
  """Of every weight, in our layout and back in theirs."""
  model = pair.peer.model
  model.zero_grad()
  logits = model(torch.tensor(hf_models.tokens())).logits
  logits.backward(torch.tensor(cotangent()))
  out, grads = pair.ours
  close(out.logits_BLV, logits.detach(), "logits")
  ours = as_theirs(pair, grads)
  wanted = {name: p.grad.numpy() for name, p in model.named_parameters()}
  wanted = their_files(model, wanted)
  assert ours.keys() == wanted.keys()
  unused = [name for name in wanted if not wanted[name].any()]  # experts that no token chose
  assert all(".experts." in name and not ours[name].any() for name in unused)
  assert len(unused) < len(wanted) / 10
  for name in wanted.keys() - set(unused):
    close(ours[name], wanted[name], name, 3e-5)


def as_theirs(pair, params):
  """{their name: values} of our parameters, without the bias, which has no gradient."""
  arrays = {
    sharding.path_of(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  family = pair.made.family
  found = layout.tensors(pair.model, parts.TOP, family.layer, parts.LAYER)
  return {
    t.name: t.pack([arrays[p.path][p.place] for p in t.parts])
    for t in found
    if t.parts[0].path != layout.BIAS
  }


def their_files(model, values):
  """Gradients by the names that save_pretrained writes, of which it is a linear map."""
  with torch.no_grad():
    kept = {name: p.clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
      parameter.copy_(torch.tensor(values[name]))
    state = transformers.core_model_loading.revert_weight_conversion(model, model.state_dict())
    arrays = {name: tensor.numpy().copy() for name, tensor in state.items()}
    for name, parameter in model.named_parameters():
      parameter.copy_(kept[name])
  tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
  return {
    name: array
    for name, array in arrays.items()
    if name not in tied and "e_score_correction_bias" not in name
  }


def test_experts_in_one_tensor_are_the_same_weights(pair, tmp_path):
  """As transformers 5 holds them, and writes them if it is asked to."""
  pair.peer.model.save_pretrained(tmp_path, save_original_format=False)
  with jax.set_mesh(pair.mesh):
    found = importing.read_weights(importing.plan(str(tmp_path), Mesh(data=1)), pair.mesh)
  jax.tree.map(np.testing.assert_array_equal, found, pair.weights)


def test_routers_choose_the_same_experts(pair):
  if not pair.model.moe.num_experts:
    pytest.skip("a dense family")
  chosen = []
  hooks = []
  for module in pair.peer.model.modules():
    if type(module).__name__.lower().endswith(("router", "topkgating")):
      hooks.append(module.register_forward_hook(lambda m, i, out: chosen.append(out)))
  ids_BL = hf_models.tokens()
  with torch.no_grad():
    pair.peer.model(torch.tensor(ids_BL))
  for hook in hooks:
    hook.remove()
  ours_ZBLE = np.asarray(pair.ours[0].choices.kept_BLE)
  assert len(chosen) == len(ours_ZBLE)
  for out, ours in zip(chosen, ours_ZBLE, strict=True):
    experts = next(o for o in out if not o.is_floating_point()).reshape(ids_BL.size, -1).numpy()
    want = np.zeros((ids_BL.size, pair.model.moe.num_experts), bool)
    np.put_along_axis(want, experts, True, axis=1)
    np.testing.assert_array_equal(ours.reshape(want.shape), want)
    assert want.sum(0).max() > want.sum(0).min(), "routing must be unbalanced"


def test_their_balance_loss_is_that_of_all_layers_loads_together(pair):
  """The conversion that docs/checkpoints.md states: over K, and of sums over the layers."""
  ids_BL = hf_models.tokens()
  fields = inspect.signature(pair.peer.model.forward).parameters
  if "output_router_logits" not in fields:
    pytest.skip("transformers has no balance loss for it")
  if pair.model.moe.score is Score.SIGMOID:
    pytest.skip("theirs takes the softmax of logits whose sigmoid the router takes")
  with torch.no_grad():
    want = pair.peer.model(torch.tensor(ids_BL), output_router_logits=True).aux_loss
  stats = pair.ours[0].stats
  sums = (x.sum(axis=0, keepdims=True) for x in (stats.routed_E, stats.prob_E, stats.tokens))
  got = balance_loss(*sums)[0] * pair.model.moe.top_k
  assert abs(want - pair.model.moe.top_k) > 1e-3, "routing must be unbalanced"
  close(got, want)


def test_what_is_exported_loads_there_and_reads_back_bit_for_bit(pair, tmp_path):
  loaded = exporting.Loaded(pair.made.config, pair.weights, 0, pair.peer.folder)
  exporting.export(loaded, pair.made.family, tmp_path / "ours", largest=20_000)
  assert (tmp_path / "ours/model.safetensors.index.json").exists()
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours",
    dtype=torch.float32,
    output_loading_info=True,
    attn_implementation="eager",
    experts_implementation="eager",
  )
  assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  ids = torch.tensor(hf_models.tokens())
  with torch.no_grad():
    got, want = theirs.eval()(ids).logits, pair.peer.model(ids).logits
  close(got, want, "logits", 1e-6)
  again = importing.plan(str(tmp_path / "ours"), Mesh(data=1))
  assert again.config.model == pair.model
  with jax.set_mesh(pair.mesh):
    weights = importing.read_weights(again, pair.mesh)
  for one, other in zip(jax.tree.leaves(weights), jax.tree.leaves(pair.weights), strict=True):
    np.testing.assert_array_equal(one, other)


def test_the_first_family_that_fits_is_chosen(pair):
  name = pair.made.family.model_type
  if name == "qwen3_5_moe_text":  # it is Qwen3-Next in other tensors
    name = "qwen3_next"
  assert exporting.choose_family(pair.model, "").model_type == name


@pytest.fixture
def checked(pair):
  """A few of the pairs: with biases and groups, sinks and windows, latents, the delta rule."""
  if pair.made.family.model_type not in ("glm4_moe", "gpt_oss", "deepseek_v3", "qwen3_next"):
    pytest.skip("four families are checked")
  return pair


def test_check_finds_them_equal(checked):
  pair = checked
  result = check.compare_streams(pair.streams, pair.their_streams)
  assert result.top_1 == 1 and abs(result.kl) < 1e-6 and result.logits < 1e-5
  assert len(result.layers) == pair.model.num_layers + 1 and max(result.layers) < 1e-5
  assert "they agree" in check.check_report(result)


def test_check_finds_the_layer_in_which_they_part(checked):
  """Where one layer's attention is changed, the layers before it agree."""
  pair = checked
  where, place = pattern.layer_places(pair.model)[1]

  def change(path, leaf):
    outs = [(*where, "attention", name) for name in ("out_HAD", "out_HXD", "out_OXD")]
    return leaf.at[place].multiply(1.5) if sharding.path_of(path) in outs else leaf

  params = jax.tree_util.tree_map_with_path(change, pair.weights.params)
  ids_L = hf_models.tokens()[0]
  with jax.set_mesh(pair.mesh):
    ours = check.streams(pair.made, pair.weights._replace(params=params), ids_L)
  result = check.compare_streams(ours, pair.their_streams)
  assert max(result.layers[:2]) < 1e-5 < 1e-3 < result.layers[2]
  assert "they part          in layer 1, by" in check.check_report(result)


@pytest.mark.slow
def test_the_same_greedy_tokens(checked):
  pair = checked
  ours = decoding.for_inference(pair.model)
  with jax.set_mesh(pair.mesh):
    weights = decoding.weights(ours, pair.weights.params, pair.weights.bias_ZE)
  text = generate.TextGenerator(ours, weights, pair.mesh, hf_models.Pieces())
  prompts = [text.tokenizer.decode(ids) for ids in 1 + hf_models.tokens(72).reshape(-1, 9) % 36]
  rows = text.generate(prompts, max_new_tokens=64, temperature=0)
  compared = 0
  for prompt, row in zip(prompts, rows, strict=True):
    if compared > 128:  # some families end their texts early, and others never
      break
    compared += len(row.tokens)
    ids = torch.tensor([[0, *text.tokenizer.encode(prompt)]])
    with torch.no_grad():
      want = pair.peer.model.generate(
        ids, max_new_tokens=64, do_sample=False, eos_token_id=0, pad_token_id=0
      )
    want = want[0, ids.shape[1] :].tolist()
    assert row.tokens == (want[:-1] if row.finished else want)
  assert compared > 64


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_the_text_model_beside_one_of_images(stacked, tmp_path):
  """As transformers writes it, and with one tensor for all experts, as Qwen3.5 is published."""
  fields = dict(hf_models.COMMON | CONFIGS["qwen3_5_moe_text"], num_hidden_layers=2)
  fields["layer_types"] = fields["layer_types"][:2]
  vision = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=12,
    num_heads=2,
    out_hidden_size=20,
    num_position_embeddings=16,
  )
  whole = transformers.AutoConfig.for_model("qwen3_5_moe", text_config=fields, vision_config=vision)
  model = transformers.Qwen3_5MoeForConditionalGeneration(whole)
  model.save_pretrained(tmp_path)
  if stacked:
    stack_experts(tmp_path / "model.safetensors", 7)
  made = importing.plan(str(tmp_path), Mesh(data=1))
  assert any("vision" in note for note in made.notes)
  mesh, ids_L = mesh_of(), hf_models.tokens()[0]
  with jax.set_mesh(mesh):
    ours = check.streams(made, importing.read_weights(made, mesh), ids_L)
  assert check.compare_streams(ours, check.theirs(tmp_path, ids_L)).logits < 1e-5


def stack_experts(path, experts):
  """Rewrites a file with gate and up of all experts in one tensor, and down in another."""
  arrays = safetensors.numpy.load_file(path)
  for down in [name for name in arrays if name.endswith(".experts.0.down_proj.weight")]:
    prefix = down.removesuffix("0.down_proj.weight")
    gate, up, down = (
      np.stack([arrays.pop(f"{prefix}{e}.{name}.weight") for e in range(experts)])
      for name in ("gate_proj", "up_proj", "down_proj")
    )
    arrays[prefix + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
    arrays[prefix + "down_proj"] = down
  safetensors.numpy.save_file(arrays, path, {"format": "pt"})
