"""The decoding benchmark's worker."""

import sys
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks import train
from moe_jax.config import UserError
from tests.support.toys import TOY_SIZES


class Decoded(NamedTuple):
  one: dict  # the answer for a batch of one row
  three: dict
  refused: str  # what a wrong question brings
  parameters: int
  weights: dict[str, np.ndarray]  # by the names of transformers


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
  """What a worker of the toy's sizes answers and writes."""
  folder = tmp_path_factory.mktemp("weights")
  sizes = {k: v for k, v in TOY_SIZES.items() if k not in ("seq_len", "batch_size")}
  command = [sys.executable, "-m", "benchmarks.decode_worker", f"--weights={folder}"]
  command += [f"--{name}={value}" for name, value in sizes.items()] + ["--rows=3"]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MOE_JAX_CACHE", str(folder / "cache"))
    worker = train.Worker(train.Command("ours", command))
  try:
    one, three = worker.ask("decode 1 40"), worker.ask("decode 3 40")
    with pytest.raises(UserError) as refused:
      worker.ask("decode 1")
  finally:
    worker.close()
  weights = {path.stem: np.load(path) for path in folder.glob("*.npy")}
  return Decoded(one, three, str(refused.value), worker.ready["parameters"], weights)


@pytest.mark.slow
def test_a_worker_measures_and_decodes_every_row(decoded):
  assert decoded.one["cpu_s"] > 0 and np.shape(decoded.three["tokens"]) == (3, 40)


@pytest.mark.slow
def test_a_row_has_the_same_tokens_whatever_the_batch(decoded):
  three = decoded.three["tokens"]
  assert decoded.one["tokens"][0] == three[0] and 0 not in np.array(three)


@pytest.mark.slow
def test_a_worker_refuses_what_it_does_not_know(decoded):
  assert "is not `decode B N`" in decoded.refused


@pytest.mark.slow
def test_every_prompt_begins_with_the_separator(decoded):
  prompts = decoded.weights["prompts"]
  assert prompts.shape == (3, 16) and (prompts[:, 0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [
  ("model.layers.0.mlp.experts.gate_up_proj", (2, 32, 16)),
  ("model.layers.0.self_attn.k_proj.weight", (8, 16)),
])  # fmt: skip
def test_weights_have_the_names_and_shapes_of_transformers(name, shape, decoded):
  assert decoded.weights[name].shape == shape


@pytest.mark.slow
def test_all_weights_are_written(decoded):
  """All files but the prompts."""
  assert sum(a.size for a in decoded.weights.values()) - 48 == decoded.parameters
