"""Checkpoints in the format of Hugging Face as files: what is refused, and what a host holds."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import moe_jax
from moe_jax.config import override
from moe_jax.data.tokenizers import load_tokenizer
from moe_jax.errors import StorageError, UserError
from moe_jax.hf import exporting, families, fields, files, importing
from moe_jax.kernels import platform
from tests.support.disks import fill, small_disk
from tests.support.hf_files import exact_leaves, loaded, plan, toy
from tests.support.scripts import call, python
from tests.support.toys import mesh_of, toy_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint of several files."""
  path = tmp_path_factory.mktemp("hf") / "whole"
  with jax.set_mesh(mesh_of()):
    family = families.FAMILIES["qwen3_moe"]
    exporting.export(loaded(toy()), family, path, largest=4000)
  return path


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def change(path, name, edit):
  """Edits one tensor in its file."""
  index = json.loads((path / files.INDEX).read_text())["weight_map"]
  held = safetensors.numpy.load_file(path / index[name])
  held = edit(dict(held))
  safetensors.numpy.save_file(held, path / index[name])


def set_config(path, **values):
  config = json.loads((path / files.CONFIG).read_text())
  (path / files.CONFIG).write_text(json.dumps(config | values))


def rename(path, old, new):
  """Changes the beginning of the names of all tensors, and leaves no index."""
  (path / files.INDEX).unlink(missing_ok=True)
  for file in path.glob("*.safetensors"):
    held = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({new + n.removeprefix(old): w for n, w in held.items()}, file)


DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize(
  "axes",
  [dict(expert=4), dict(expert=2, fsdp=2, tensor=2), dict(data=2, fsdp=2)],
  ids=str,
)
def test_every_mesh_reads_the_same_weights(folder, axes):
  mesh = mesh_of(**axes)
  with jax.set_mesh(mesh):
    got = importing.read_weights(plan(folder, **axes), mesh)
  for one, other in zip(jax.tree.leaves(got.params), exact_leaves(), strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_device_reads_its_own_part(folder):
  """Of four devices along `expert`, each reads a quarter of the experts, and no byte twice."""
  mesh = mesh_of(expert=4)
  made = plan(folder, expert=4)
  with jax.set_mesh(mesh):
    importing.read_weights(made, mesh)
  assert made.stored.bytes_read <= made.bytes_to_read


def test_files_without_an_index_are_found_by_their_numbers(copy):
  (copy / files.INDEX).unlink()
  with jax.set_mesh(mesh_of()):
    got = importing.read_weights(plan(copy), mesh_of())
  for one, other in zip(jax.tree.leaves(got.params), exact_leaves(), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_head_that_is_not_the_embedding_is_kept(factor, copy):
  """Where config.json says that they are one: the file is right, as for transformers."""
  head, embedding = "lm_head.weight", "model.embed_tokens.weight"
  (copy / files.INDEX).unlink()
  path = copy / "model-00001-of-00007.safetensors"
  held = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(held | {head: factor * held[embedding]}, path)
  made = plan(copy)
  assert made.config.model.tied_head == (factor == 1)
  assert len([n for n in made.notes if f"{head} is not the embedding" in n]) == factor - 1


def test_matrices_of_the_same_bytes_and_other_scales_are_not_the_same(tmp_path):
  """Of FP8 the file holds bytes, and a scale beside them."""
  matrix = np.ones((3, 4), ml_dtypes.float8_e4m3fn)
  scales = {"one": 1.0, "other": 2.0, "again": 1.0}
  held = {f"{name}.weight": matrix for name in scales}
  held |= {f"{name}.weight_scale_inv": np.full((1, 1), x, np.float32) for name, x in scales.items()}
  safetensors.numpy.save_file(held, tmp_path / files.SINGLE)
  stored = files.StoredTensors(tmp_path)
  assert not stored.same("one.weight", "other.weight")
  assert stored.same("one.weight", "again.weight")


def test_everybody_may_read_what_is_exported(folder):
  modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
  assert set(modes.values()) == {modes[files.CONFIG]}, modes


def test_bfloat16_is_read_as_it_stands(tmp_path):
  with jax.set_mesh(mesh_of()):
    family = families.FAMILIES["qwen3_moe"]
    exporting.export(loaded(toy()), family, tmp_path / "half", "bfloat16")
    got = importing.read_weights(plan(tmp_path / "half"), mesh_of())
  for one, exact in zip(jax.tree.leaves(got.params), exact_leaves(), strict=True):
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, np.asarray(exact).astype(ml_dtypes.bfloat16))


def test_all_that_does_not_fit_is_named(copy):
  change(
    copy, DOWN, lambda held: held | {DOWN: held[DOWN][:, :-1].copy(), "more.weight": held[DOWN]}
  )
  gone = "model.layers.0.self_attn.q_proj.weight"
  change(copy, gone, lambda held: {k: v for k, v in held.items() if k != gone})
  with pytest.raises(UserError) as error:
    plan(copy)
  said = str(error.value)
  assert "3 tensor(s) do not fit" in said and f"missing: {gone}" in said
  assert "not of this model: more.weight" in said and f"of another shape: {DOWN} is" in said


def test_values_that_are_not_finite_are_named(copy):
  def spoil(held):
    held[DOWN] = held[DOWN].copy()
    held[DOWN][0, 0] = np.nan
    return held

  change(copy, DOWN, spoil)
  made = plan(copy)
  with jax.set_mesh(mesh_of()), pytest.raises(UserError, match=f"not finite in {DOWN}"):
    importing.read_weights(made, mesh_of())


BAD = {
  "no folder": (lambda p: shutil.rmtree(p), "no such folder"),
  "no config": (lambda p: (p / files.CONFIG).unlink(), "config.json: no such file"),
  "no json": (lambda p: (p / files.CONFIG).write_text("{"), "config.json is damaged"),
  "a list": (lambda p: (p / files.CONFIG).write_text("[]"), "it holds a list, not an object"),
  "deep": (lambda p: (p / files.CONFIG).write_text("[" * 10**5), "config.json is damaged"),
  "unknown family": (lambda p: set_config(p, model_type="gpt9"), "model_type='gpt9' is not known"),
  "no field": (lambda p: set_config(p, hidden_size=None), "hidden_size is missing"),
  "wrong type": (lambda p: set_config(p, hidden_size="wide"), "no value of config.model.dim"),
  "no number": (lambda p: set_config(p, head_dim=None, hidden_size="wide"), "of another kind"),
  "base": (lambda p: set_config(p, rope_parameters={"rope_theta": "far"}), "of another kind"),
  "rope is a list": (lambda p: set_config(p, rope_parameters=[1]), "of another kind"),
  "no heads": (lambda p: set_config(p, head_dim=None, num_attention_heads=0), "head_dim is mis"),
  "huge": (lambda p: set_config(p, num_hidden_layers=10**9), "it has 1,000,000,000 layers and 4"),
  "huge layers": (lambda p: set_config(p, num_experts=10**7), "and 10,000,000 experts, but the fi"),
  "quantized": (lambda p: set_config(p, quantization_config={"quant_method": "awq"}), "by 'awq'"),
  "another prefix": (lambda p: rename(p, "", "wrapped."), "no tensor has the name of one"),
  "no index, and a missing file": (
    lambda p: [(p / name).unlink() for name in (files.INDEX, "model-00002-of-00007.safetensors")],
    "file 2 of 7 is missing",
  ),
  "activation": (lambda p: set_config(p, hidden_act="gelu"), "hidden_act='gelu' cannot be"),
  "window": (lambda p: set_config(p, use_sliding_window=True), "use_sliding_window=True cannot"),
  "dense layers": (lambda p: set_config(p, mlp_only_layers=[1, 7]), "model.moe.dense_layers=1,7"),
  "another tokenizer": (lambda p: (p / "tiktoken.model").touch(), "tiktoken.model, is not read"),
  "a third": (lambda p: (p / "tekken.json").touch(), "tekken.json, is not read"),
  "a code": (lambda p: (p / "tokenization_x.py").touch(), "tokenization_x.py, is not read"),
  "more ids": (lambda p: [set_config(p, bos_token_id=None, eos_token_id=None),
                          letters(26).save(str(p / "tokenizer.json"))], "=24 is less than the 27"),
  "rope": (lambda p: set_config(p, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
           "rope_type='dynamic' cannot be expressed"),
  "heads": (lambda p: set_config(p, num_key_value_heads=3), "config.model.num_kv_heads=3"),
  "pickled": (lambda p: [f.rename(f.with_suffix(".bin")) for f in p.glob("*.safetensors*")],
              "are pickled programs, which are not run"),
  "a cut file": (lambda p: os.truncate(p / "model-00001-of-00007.safetensors", 900), "damaged"),
  "a missing file": (lambda p: (p / "model-00002-of-00007.safetensors").unlink(), "no such file"),
  "a path in the index": (
    lambda p: (p / files.INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
    "names '../x.safetensors', which is no file there",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(name, copy):
  spoil, said = BAD[name]
  assert len(list(copy.glob("*.safetensors"))) == 7
  spoil(copy)
  with pytest.raises(UserError, match=said):
    plan(copy)


def test_what_a_family_cannot_say_is_named():
  changed = {"moe.gate_scale": 2.0, "rotary_fraction": 0.67, "moe.shared_experts": 1}
  model = override(toy(), {f"model.{name}": value for name, value in changed.items()}).model
  with pytest.raises(UserError) as error:
    fields.to_theirs(families.FAMILIES["qwen3_moe"], model)
  said = str(error.value)
  assert "moe.gate_scale=2.0 (it has 1.0)" in said and "rotary_fraction=0.67" in said
  assert "moe.shared_experts=1 (it has 0)" in said
  with pytest.raises(UserError, match="no family can say this model; the nearest"):
    exporting.choose_family(model, "")
  with pytest.raises(UserError, match="--family=gpt9: there are mixtral"):
    exporting.choose_family(model, "gpt9")
  dense = toy_config(num_experts=0).model
  with pytest.raises(UserError, match=r"moe.num_experts=0: it has experts"):
    fields.to_theirs(families.FAMILIES["mixtral"], dense)
  assert exporting.choose_family(dense, "").model_type == "llama"


def test_a_balancing_bias_is_not_dropped(tmp_path):
  run = loaded(toy())
  run = run._replace(weights=run.weights._replace(bias_ZE=run.weights.bias_ZE + 0.1))
  with jax.set_mesh(mesh_of()), pytest.raises(UserError, match="no bias that balances"):
    exporting.export(run, families.FAMILIES["qwen3_moe"], tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_an_export_that_has_no_room_leaves_nothing(tmp_path):
  with small_disk(tmp_path / "disk", "1m") as disk, jax.set_mesh(mesh_of()):
    filler = fill(disk)
    with pytest.raises(StorageError, match="cannot be written"):
      exporting.export(loaded(toy()), families.FAMILIES["qwen3_moe"], disk / "out")
    filler.unlink()
    assert not list(disk.iterdir())
    exporting.export(loaded(toy()), families.FAMILIES["qwen3_moe"], disk / "out")
    plan(disk / "out")


def test_a_folder_with_files_is_not_written_to(folder):
  with pytest.raises(UserError, match="is not empty"):
    exporting.export(loaded(toy()), families.FAMILIES["qwen3_moe"], folder)


def letters(count):
  vocabulary = {"<|endoftext|>": 0} | {chr(97 + i): 1 + i for i in range(count)}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  model.add_special_tokens(["<|endoftext|>"])
  return model


def test_a_run_is_exported_with_its_own_tokenizer(tmp_path):
  letters(20).save(str(tmp_path / "mine.json"))
  beside = {"tokenizer_config.json": '{"eos_token": "<|endoftext|>"}', "config.json": "{}"}
  for name, text in beside.items():
    (tmp_path / name).write_text(text)
  config = override(toy(), {"data.tokenizer": str(tmp_path / "mine.json")})
  with jax.set_mesh(mesh_of()):
    exporting.export(loaded(config), families.FAMILIES["qwen3_moe"], tmp_path / "out")
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
  out = json.loads((tmp_path / "out/config.json").read_text())
  assert (out["bos_token_id"], out["eos_token_id"]) == (0, 0) and out["num_experts"] == 4
  assert json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]["c"] == 3
  again = load_tokenizer(plan(tmp_path / "out").config.data)
  assert again.before == [0]  # also where a server encodes it, a text begins as in training
  assert again.encode("cab").tolist() == [3, 1, 2]


def test_transformers_takes_the_exported_tokenizer_as_it_is(tmp_path):
  """Not that of the family's class, which it would make where no file names another."""
  transformers = pytest.importorskip(
    "transformers", reason="compares with Hugging Face: pip install -e '.[hf]'"
  )
  vocabulary = {"<|endoftext|>": 0, "\u2581": 1, "a": 2, "b": 3, "\u2581a": 4}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("\u2581", "a")]))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  model.add_special_tokens(["<|endoftext|>"])
  model.save(str(tmp_path / "mine.json"))
  config = override(toy(), {"data.tokenizer": str(tmp_path / "mine.json")})
  with jax.set_mesh(mesh_of()):
    exporting.export(loaded(config), families.FAMILIES["qwen3_moe"], tmp_path / "out")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert theirs("abc").input_ids == [0, 4, 3] and theirs("a b").input_ids == [0, 4, 1, 3]
  assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 0)


def test_an_export_is_in_its_own_type(copy, tmp_path):
  set_config(copy, quantization_config={"quant_method": "fp8"})
  with jax.set_mesh(mesh_of()):
    made = plan(copy)
    importing.save_import(made, importing.read_weights(made, mesh_of()), tmp_path / "run")
    run = loaded(made.config)._replace(beside=tmp_path / "run/hf")
    exporting.export(run, made.family, tmp_path / "out")
  assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
  ("longest", "memory", "expected"),
  [(64, None, (64, 8)), (65_536, None, (65_536, 1)), (None, None, (2048, 8)),
   (65_536, 4_000_000, (16_384, 1)), (65_536, 200_000, (2048, 8))],
)  # fmt: skip
def test_rows_are_as_long_as_the_model_and_memory_allow(
  longest, memory, expected, copy, monkeypatch
):
  """The logits of a row, float32 [L, 24], have half of what the weights leave."""
  monkeypatch.setattr(platform, "memory_bytes", lambda: memory)
  set_config(copy, max_position_embeddings=longest)
  data = plan(copy).config.data
  assert (data.seq_len, data.batch_size) == expected


@pytest.mark.slow
def test_the_tokenizer_travels(tmp_path):
  """In with the weights, to a workdir that has moved, to what is trained from it, and out."""
  model = letters(20)
  config = toy()
  family = families.FAMILIES["qwen3_moe"]
  with jax.set_mesh(mesh_of()):
    exporting.export(loaded(config), family, tmp_path / "in")
    model.save(str(tmp_path / "in/tokenizer.json"))
    set_config(tmp_path / "in", bos_token_id=None, eos_token_id=None)
    (tmp_path / "in/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "in/generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    made = plan(tmp_path / "in")
    importing.save_import(made, importing.read_weights(made, mesh_of()), tmp_path / "first")
  (tmp_path / "first").rename(tmp_path / "moved")
  shutil.rmtree(tmp_path / "in")
  generator = moe_jax.load(tmp_path / "moved")
  (text,) = generator.generate("abc", max_new_tokens=8, temperature=0)
  assert text.tokens and all(token <= 20 for token in text.tokens)
  assert generator.tokenizer.encode("abc").tolist() == [1, 2, 3]
  (tmp_path / "texts").mkdir()
  for number in range(40):
    (tmp_path / f"texts/{number}.txt").write_text("abcdefghij" * 20)
  done = call(
    "train.py",
    f"--config={tmp_path / 'moved'}",
    f"--init_from={tmp_path / 'moved'}",
    f"--workdir={tmp_path / 'run'}",
    "--config.data.name=text",
    "--config.train.steps=2",
    "--config.optimizer.warmup_steps=1",
    "--config.mesh.data=8",
    f"--config.data.path={tmp_path / 'texts'}",
    "--config.eval.batches=1",
  )
  assert not done.returncode, done.stderr
  shutil.rmtree(tmp_path / "moved")
  trained = moe_jax.load(tmp_path / "run")
  assert trained.imported and list(trained.tokenizer.ends) == [3, 5]
  exporting.export(exporting.load_run(str(tmp_path / "run"), 0), family, tmp_path / "out")
  assert (tmp_path / "out/tokenizer.json").read_text() == model.to_str(pretty=True)
  assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
  ends = json.loads((tmp_path / "out/generation_config.json").read_text())
  assert ends == {"eos_token_id": [3, 5]}


def hf(*arguments):
  return python("-m", "moe_jax.hf", *arguments)


@pytest.mark.slow
def test_in_generate_and_out_again_by_command(folder, tmp_path):
  done = hf("import", f"--from={folder}", f"--workdir={tmp_path / 'run'}")
  assert not done.returncode and "holds it as step 0" in done.stdout, done.stderr
  options = (f"--init_from={tmp_path / 'run'}", "--describe", "--config=configs/debug.py")
  assert not call("train.py", *options).returncode
  done = hf("export", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")
  assert not done.returncode and "as qwen3_moe in float32" in done.stdout, done.stderr
  before, after = (plan(p) for p in (folder, tmp_path / "out"))
  for tensor in before.tensors:
    ranges = tuple(slice(0, n) for n in tensor.shape)
    np.testing.assert_array_equal(
      before.stored.read(tensor.name, ranges), after.stored.read(tensor.name, ranges)
    )
  again = hf("import", f"--from={folder}", f"--workdir={tmp_path / 'run'}")
  assert again.returncode == 2 and "is not empty" in again.stderr
  dry = hf("import", f"--from={folder}", "--dry-run")
  assert not dry.returncode and "memory" in dry.stdout and not (tmp_path / "dry").exists()
