"""Rows of random documents in two domains, and a toy model to read them."""

import functools

import jax
import numpy as np

from moe_jax.analysis import trace
from moe_jax.data import pipeline, tokenizers
from moe_jax.model import transformer
from moe_jax.training import setup as setup_lib
from tests.support.toys import mesh_of, toy_config

S = 23  # the separator of a vocabulary of 24


def toy_rows(lengths, labels, domains=("a", "b"), seq_len=9):
  """Documents of random ids, of these lengths and domains; an id i stands for i % 3 bytes."""
  rng = np.random.default_rng(1)
  tokenizer = tokenizers.Tokenizer([b"xx"[: i % 3] for i in range(S)] + [b""], S, "toy")
  documents = [np.array([S, *rng.integers(0, S, length)]) for length in lengths]
  stream_N = np.concatenate([*documents, [S]])
  starts_M = np.cumsum([0, *map(len, documents[:-1])])
  return pipeline.Rows(
    stream_N=stream_N,
    seq_len=seq_len,
    tokenizer=tokenizer,
    num_documents=len(documents),
    num_bytes=1,
    digest="",
    domains=domains,
    starts_M=starts_M,
    domain_M=np.array(labels),
    source_M=np.arange(len(labels)),
  )


@functools.cache
def weights():
  """Of toy_config, with routers as uneven as learned ones; any routing can use them."""
  with jax.set_mesh(mesh_of()):
    setup = setup_lib.make(toy_config(), mesh_of())
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: np.asarray(leaf) * (30 if "router_DE" in str(path) else 1),
      setup.init().params,
    )


def toy_model(config):
  return trace.RestoredModel(config.model, weights(), np.zeros((2, 4), np.float32))


def read(model, batch):
  """Logits and statistics."""
  read = jax.jit(lambda *arrays: transformer.evaluate(model.config, *arrays))
  return read(model.params, model.bias_ZE, batch)
