"""The decoding benchmark's worker."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy

from benchmarks import train
from moe_jax.config import UserError
from tests.support.toys import TOY_SIZES


class Decoded(NamedTuple):
  one: dict  # the answer for a batch of one row
  three: dict
  refused: str  # what a wrong question brings
  parameters: int
  weights: dict[str, np.ndarray]  # by the names of transformers
  prompts: np.ndarray


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
  """What a worker of the toy's sizes answers and writes."""
  folder = tmp_path_factory.mktemp("weights")
  sizes = TOY_SIZES | dict(top_k=2)
  sizes = {k: v for k, v in sizes.items() if k not in ("seq_len", "batch_size")}
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
  weights = safetensors.numpy.load_file(folder / "mixtral/model.safetensors")
  prompts = np.load(folder / "prompts.npy")
  return Decoded(one, three, str(refused.value), worker.ready["parameters"], weights, prompts)


@pytest.mark.benchmark
def test_a_worker_measures_and_decodes_every_row(decoded):
  assert decoded.one["cpu_s"] > 0 and np.shape(decoded.three["tokens"]) == (3, 40)


@pytest.mark.benchmark
def test_a_row_has_the_same_tokens_whatever_the_batch(decoded):
  three = decoded.three["tokens"]
  assert decoded.one["tokens"][0] == three[0] and 0 not in np.array(three)


@pytest.mark.benchmark
def test_a_worker_refuses_what_it_does_not_know(decoded):
  assert "is not `decode B N`" in decoded.refused


@pytest.mark.benchmark
def test_every_prompt_begins_with_the_separator(decoded):
  prompts = decoded.prompts
  assert prompts.shape == (3, 16) and (prompts[:, 0] == 0).all()


@pytest.mark.benchmark
def test_all_weights_are_written_as_mixtral_has_them(decoded):
  weights = decoded.weights
  assert weights["model.layers.0.block_sparse_moe.experts.1.w1.weight"].shape == (16, 16)
  assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (8, 16)
  assert sum(array.size for array in weights.values()) == decoded.parameters
