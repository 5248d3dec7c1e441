"""What an import holds and reads: a piece of a tensor at a time; only headers in a dry run."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from configs import published
from moe_jax.config import Dtype, QKNorm, override
from moe_jax.errors import UserError
from moe_jax.hf import exporting, families, fields, files, importing, layout, parts
from moe_jax.model import pattern
from moe_jax.storage.weights import Weights
from tests.support.hf_files import plan
from tests.support.scripts import python
from tests.support.toys import build, mesh_of, toy_config

_WITHIN = """
import resource, sys
gigabytes = float(sys.argv[1])
import jax
from moe_jax import sharding
from moe_jax.config import Mesh
from moe_jax.hf import importing
made = importing.plan(sys.argv[2], Mesh(data=1))
mesh = sharding.make_mesh(made.config.mesh)
base = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (base + int(gigabytes * 2**30),) * 2)
if sys.argv[3] == "whole":
  import safetensors.numpy
  held = {n: t for f in made.stored.folder.glob("*.safetensors")
          for n, t in safetensors.numpy.load_file(f).items()}
with jax.set_mesh(mesh):
  weights = importing.read_weights(made, mesh)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 2**30)
"""


_GIGABYTES = int(os.environ.get("IMPORT_GIGABYTES", "1"))  # 4 takes 40 s and 8 GB of disk


@pytest.mark.slow
def test_a_host_holds_what_its_devices_hold_and_a_little_more(tmp_path):
  """Under a limit at which reading the whole checkpoint first fails."""
  fields = {"model.dim": 768, "model.num_layers": 14 * _GIGABYTES, "model.vocab_size": 256}
  fields["model.qk_norm"] = QKNorm.HEAD
  config = toy_config(fields, num_experts=8, top_k=2, expert_dim=1024)
  stored_names = write_synthetic(config, tmp_path / "large")
  made = plan(tmp_path / "large")
  held = 4 * sum(int(np.prod(t.shape)) for t in made.tensors) / 2**30
  assert held > 0.95 * _GIGABYTES and len(stored_names) > 100
  room = held + 2 * 4 * 768 * 1024 / 2**30 + 0.1  # two of its largest tensors, and programs
  done = within(room, tmp_path / "large", "parts")
  assert not done.returncode, done.stderr[-2000:]
  assert float(done.stdout) == pytest.approx(held, rel=0.01)
  done = within(room, tmp_path / "large", "whole")
  assert done.returncode and "emory" in done.stderr


def within(gigabytes, path, how):
  return python("-c", _WITHIN, gigabytes, path, how)


def write_synthetic(config, path):
  """A checkpoint of this shape with random values, written without ever holding the model."""
  family = families.FAMILIES["qwen3_moe"]
  found = layout.tensors(config.model, parts.TOP, family.layer, parts.LAYER)
  sizes = {t.name: 4 * int(np.prod(t.shape)) for t in found}
  shapes = {t.name: t.shape for t in found}
  rng = np.random.default_rng(0)
  files.write_checkpoint(
    path,
    sizes,
    2 * 10**8,
    lambda name: rng.standard_normal(shapes[name], np.float32),
    fields.to_theirs(family, config.model) | {"max_position_embeddings": 64},
    {},
  )
  return list(sizes)


def write_headers(config, family, path):
  """A checkpoint of this shape in bfloat16 whose files have headers and holes."""
  path.mkdir()
  found = layout.tensors(config.model, parts.TOP, family.layer, parts.LAYER)
  header, end = {}, 0
  for tensor in found:
    size = 2 * int(np.prod(tensor.shape))
    header[tensor.name] = {
      "dtype": "BF16",
      "shape": tensor.shape,
      "data_offsets": [end, end + size],
    }
    end += size
  text = json.dumps(header).encode()
  with open(path / files.SINGLE, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
  theirs = fields.to_theirs(family, config.model) | {"max_position_embeddings": 4096}
  (path / files.CONFIG).write_text(json.dumps(theirs))
  return end


@pytest.mark.parametrize(
  ("name", "family", "gigabytes"),
  [
    ("olmoe_1b_7b", "olmoe", 13.84),
    pytest.param("qwen3_30b_a3b", "qwen3_moe", 61.06, marks=pytest.mark.slow),
  ],
)
def test_a_dry_run_reads_headers_and_predicts(name, family, gigabytes, tmp_path, monkeypatch):
  """Of the published shapes, on a machine of any size."""
  config = published.get_config(name)
  size = write_headers(config, families.FAMILIES[family], tmp_path / name)
  monkeypatch.setattr("moe_jax.kernels.platform.memory_bytes", lambda: 2**40)
  made = plan(tmp_path / name)
  assert made.bytes_to_read == size and size / 1e9 == pytest.approx(gigabytes, abs=0.01)
  assert made.stored.bytes_read == 0
  assert f"{gigabytes:.2f} GB of files" in importing.import_report(made)
  monkeypatch.setattr("moe_jax.kernels.platform.memory_bytes", lambda: 2**34)
  with pytest.raises(UserError, match="weights: at least"):
    importing.import_report(made)


@pytest.mark.slow
def test_the_layers_and_experts_of_olmoe_at_a_smaller_width(tmp_path):
  """Its true number of layers and experts: 3,219 tensors, in and out again in bfloat16."""
  smaller = dict(dim=64, num_heads=4, num_kv_heads=4, head_dim=16, vocab_size=512)
  fields = {f"model.{name}": size for name, size in smaller.items()}
  fields |= {"model.moe.expert_dim": 32, "model.compute_dtype": Dtype.FLOAT32}
  config = override(published.get_config("olmoe_1b_7b"), fields)
  model = config.model
  family = families.FAMILIES["olmoe"]
  with jax.set_mesh(mesh_of(expert=4)):
    _, params = build(config)
    run = exporting.Loaded(
      config,
      Weights(params, np.zeros(pattern.bias_shape(model), np.float32)),
      0,
      pathlib.Path("none"),
    )
    exporting.export(run, family, tmp_path / "olmoe", "bfloat16", largest=2 * 10**6)
    made = plan(tmp_path / "olmoe", expert=4)
    got = importing.read_weights(made, mesh_of(expert=4))
    again = exporting.Loaded(made.config, got, 0, tmp_path / "olmoe")
    exporting.export(again, family, tmp_path / "again", "bfloat16", largest=2 * 10**6)
  assert len(made.tensors) == len(made.stored.shapes) == 3219
  names = sorted(p.name for p in (tmp_path / "olmoe").glob("*.safetensors"))
  assert len(names) > 3
  for name in names:
    assert (tmp_path / "olmoe" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
