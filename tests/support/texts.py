"""Texts, documents and rows that the tests of moe_jax/data start from."""

import itertools
import time

import pytest

from moe_jax.data import pipeline
from moe_jax.data.documents import Documents
from moe_jax.errors import UserError

S = 256  # the bytes tokenizer's separator
SPLITS = ("train", "validation", "test")
PROSE = "".join(f"Line {i}: the quick brown fox, naïve café, 日本 {i * i}\n" for i in range(300))


def load(config):
  return {split: pipeline.load_rows(config, split) for split in SPLITS}


def documents_of(texts):
  return Documents("", (), lambda: (len(texts), ((i, "", text) for i, text in enumerate(texts))))


def read(documents):
  """The texts of a split, in its order."""
  return [text for _, _, text in sorted(documents.read()[1])]


def everything(rows):
  return [text for _, text in rows.texts(range(len(rows)))]


def joined(lists):
  return list(itertools.chain.from_iterable(lists))


def error_of(config, split="train", seconds=100):
  start = time.monotonic()
  with pytest.raises(UserError) as caught:
    pipeline.load_rows(config, split)
  assert time.monotonic() - start < seconds
  message = str(caught.value)
  assert "\n" not in message
  return message
