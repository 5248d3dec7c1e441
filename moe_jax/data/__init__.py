"""Text data: TFDS documents, tokenizers, packed rows, and a Grain iterator over batches."""

from moe_jax.data.builders import Documents, prepare
from moe_jax.data.pipeline import (
  Batch,
  Rows,
  eval_batches,
  eval_rows,
  gzip_bits_per_byte,
  load_rows,
  train_iterator,
)
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.tokenizers import load as load_tokenizer

__all__ = [
  "Batch",
  "Documents",
  "Rows",
  "Tokenizer",
  "eval_batches",
  "eval_rows",
  "gzip_bits_per_byte",
  "load_rows",
  "load_tokenizer",
  "prepare",
  "train_iterator",
]
