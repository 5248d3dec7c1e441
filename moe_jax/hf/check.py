"""Compares our model with transformers' on one text: logits, and the residual stream by layer."""

import importlib
import pathlib
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data import tokenizers
from moe_jax.errors import UserError
from moe_jax.hf.importing import ImportPlan
from moe_jax.inference import decoding
from moe_jax.storage.weights import Weights

_PARTS = 1e-3  # a difference, relative to the largest value, from which two layers are said to part


class StreamComparison(NamedTuple):
  """How far ours and theirs are apart."""

  kl: float  # nats, mean over tokens: of theirs to ours
  top_1: float  # share of tokens with the same most likely next token
  logits: float  # the largest difference over the largest logit
  layers: list[float]  # the same of the residual stream: of the embedding, then after each layer


def streams(
  made: ImportPlan, weights: Weights, ids_L: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns logits [L, V], and the residual stream [L, D] of the embedding and after each layer."""
  model = decoding.for_inference(made.config.model)
  unrolled = decoding.weights(model, weights.params, weights.bias_ZE)
  ids_BL = jnp.asarray(ids_L, jnp.int32)[None]
  cache = decoding.empty_cache(model, jnp.zeros((1,), jnp.int32), len(ids_L))
  out = decoding.forward_with_cache(unrolled, model, cache, ids_BL, all_logits=True, trace=True)
  return np.asarray(out.logits_BLV[0]), [np.asarray(x[0], np.float32) for x in out.stream]


def theirs(folder: pathlib.Path, ids_L: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns the same of transformers, in float32.

  Raises:
    UserError: transformers or torch is missing.
  """
  try:
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
  except ImportError as error:
    raise UserError(f"{error.name} is missing: pip install 'moe_jax[hf]'") from None
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=False, experts_implementation="eager"
  ).eval()
  found: list[Any] = []
  model.model.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
  for layer in model.model.layers:
    layer.register_forward_hook(
      lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
  with torch.no_grad():
    logits = model(torch.tensor(ids_L[None])).logits[0]
  return logits.float().numpy(), [x.reshape(-1, x.shape[-1]).float().numpy() for x in found]


def compare_streams(ours: tuple[Any, list[Any]], other: tuple[Any, list[Any]]) -> StreamComparison:
  """Compares two results of `streams`."""
  (logits, layers), (want, want_layers) = ours, other
  log_p, log_q = (np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (want, logits))
  return StreamComparison(
    kl=float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1))),
    top_1=float(np.mean(want.argmax(-1) == logits.argmax(-1))),
    logits=_difference(logits, want),
    layers=[_difference(x, y) for x, y in zip(layers, want_layers, strict=True)],
  )


def _difference(x: np.ndarray, want: np.ndarray) -> float:
  return float(np.abs(x - want).max() / np.abs(want).max())


def ids_of(made: ImportPlan, text: str, most: int) -> np.ndarray:
  """Returns the ids of a text by the checkpoint's tokenizer, or by bytes where it has none."""
  ids = tokenizers.load_tokenizer(made.config.data).encode(text)[:most]
  if not len(ids) or ids.max() >= made.config.model.vocab_size:
    raise UserError("--text: it has no token of this model's vocabulary")
  return ids


def check_report(result: StreamComparison) -> str:
  """Formats a comparison, in one screen."""
  parted = next((i for i, d in enumerate(result.layers) if d > _PARTS), None)
  lines = [
    f"KL                 {result.kl:.2e} nats per token, of transformers to ours",
    f"top-1              {100 * result.top_1:.2f}% of tokens agree",
    f"logits             differ by {result.logits:.1e} of the largest",
  ]
  name = "residual stream    "
  values = " ".join(f"{d:.0e}" for d in result.layers)
  lines += textwrap.wrap(values, 66, initial_indent=name, subsequent_indent=" " * len(name))
  if parted is None:
    lines.append(f"they agree         in all {len(result.layers) - 1} layers, to {_PARTS:g}")
  else:
    after = f"in layer {parted - 1}" if parted else "in the embedding"
    lines.append(f"they part          {after}, by {result.layers[parted]:.1e} of the largest value")
  return "\n".join(lines)
