"""Tokenizers: bytes, a Hugging Face tokenizer.json, a SentencePiece .model."""

import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.config import Config, Data
from moe_jax.data import special_tokens
from moe_jax.errors import UserError

# The first of these that is a special token begins each document, where no file says which does.
_SEPARATORS = (
  "<|begin_of_text|>",
  "<|startoftext|>",
  "<s>",
  "<bos>",
  "[BOS]",
  "<\uff5cbegin\u2581of\u2581sentence\uff5c>",  # DeepSeek
  "<|endoftext|>",
  "<|end_of_text|>",
  "</s>",
  "<eos>",
  "[EOS]",
)


class Tokenizer:
  """Converts text to ids and back.

  separator: the one special id. It begins every document, and it ends a document as the target of
    its last token. `encode` never returns it for any text.
  bytes_V: number of UTF-8 bytes that each id stands for; 0 for the separator. For bytes and
    byte-level BPE the numbers of a text's ids sum exactly to its length. SentencePiece and
    Metaspace put a space before each document, and some tokenizers normalise the text; the numbers
    then sum to the length of the changed text, with the space one byte more for each document.
  fingerprint: the same string for equal tokenizers.
  separator_text: the separator as a file names it; None where it is none of a file's tokens.
  eos: the end token; the separator where no file says which.
  prefix: the id before a text where something must stand: the begin token, else `eos`.
  ends: ids that end a text by the files beside the tokenizer; none where they say nothing.
  """

  ends: Sequence[int] = ()
  separator_text: str | None = None

  def __init__(self, pieces_V: list[bytes], separator: int, fingerprint: str):
    self.separator = self.prefix = self.eos = separator
    self.fingerprint = fingerprint
    self.vocab_size = len(pieces_V)
    self.bytes_V = np.array([len(piece) for piece in pieces_V], np.int32)
    self._pieces_V = pieces_V

  def encode(self, text: bytes | str) -> np.ndarray:
    """Returns the ids of a text, integers [N]."""
    raise NotImplementedError

  def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Returns the ids of each text; the libraries of tokenizers use all cores for them."""
    return [self.encode(text) for text in texts]

  @property
  def before(self) -> list[int]:
    """The ids that the tokenizer's own rules put before a text; there may be none."""
    return [self.separator]

  def encode_special(self, text: str) -> list[int]:
    """Returns the ids of a text in which names of special tokens, "<s>", mean these tokens."""
    raise UserError("only a tokenizer.json knows special tokens by name, which a chat needs")

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    """Returns the bytes that `bytes_V` counts; ids may begin or end inside a character.

    Ids past the vocabulary, which a model with a padded vocabulary can draw, are left out.
    """
    return b"".join(self._pieces_V[i] for i in np.asarray(ids).tolist() if i < self.vocab_size)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, with U+FFFD for bytes that are no UTF-8."""
    return self.decode_bytes(ids).decode(errors="replace")

  def _text_ids(self, ids: Sequence[int] | np.ndarray) -> list[int]:
    return [int(i) for i in ids if i != self.separator and i < self.vocab_size]


class Bytes(Tokenizer):
  """One id for each byte."""

  def __init__(self) -> None:
    super().__init__([bytes([i]) for i in range(256)] + [b""], 256, "bytes")

  def encode(self, text: bytes | str) -> np.ndarray:
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    ids_N = np.asarray(ids, np.int64)
    return ids_N[ids_N < self.separator].astype(np.uint8).tobytes()


class HuggingFace(Tokenizer):
  """A tokenizer.json of the package `tokenizers`."""

  def __init__(self, path: str):
    import tokenizers

    self._model = tokenizers.Tokenizer.from_file(path)
    self._model.no_truncation()  # the file may ask for truncation and padding
    self._model.no_padding()
    self._model.encode_special_tokens = True  # "<s>" in a document is text
    beside = special_tokens.read_special_tokens(pathlib.Path(path).parent)
    special = {t.content: i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
    more = self._add(beside)
    added = self._model.get_added_tokens_decoder()
    vocabulary: dict[Any, int] = self._model.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    if size > special_tokens.MOST:
      raise UserError(
        f"config.data.tokenizer={path!r}: an id of {size - 1:,} is over {special_tokens.MOST:,}"
      )
    known = next((special[name] for name in _SEPARATORS if name in special), None)
    bos, eos = (vocabulary.get(beside.names.get(name)) for name in ("bos_token", "eos_token"))
    said = (i for i in (bos, beside.begin, eos, known, *beside.ends) if i is not None)
    separator = next(said, size)
    file = json.loads(pathlib.Path(path).read_bytes())
    for rule in ("continuing_subword_prefix", "end_of_word_suffix"):
      if mark := file["model"].get(rule):
        raise UserError(
          f"config.data.tokenizer={path!r} marks parts of words by {mark!r}, so the bytes of a "
          "text cannot be counted; take a byte-level BPE, or SentencePiece"
        )
    rules = [file.get("pre_tokenizer"), file.get("decoder")]  # split text, and put it together
    self._byte_level = '"ByteLevel"' in json.dumps(rules)
    pieces_V = [b""] * max(size, separator + 1)
    plain = self._model.get_vocab(with_added_tokens=False)  # what a text can be made of
    for piece, i in vocabulary.items():
      if i in added and (piece in special or piece not in plain):
        pieces_V[i] = b"" if added[i].special else piece.encode()
      else:
        pieces_V[i] = _byte_level(piece) if self._byte_level else _metaspace(piece)
    pieces_V[separator] = b""
    self._path = path
    beyond = f"{separator} {more}" if more or separator not in (known, size) else ""
    super().__init__(pieces_V, separator, _fingerprint(path, beyond))
    self.ends = sorted({*beside.ends, *([] if eos is None else [eos])})
    self.separator_text = self._model.id_to_token(separator)
    self.eos = separator if eos is None else eos
    self.prefix = self.eos if bos is None else bos

  def _add(self, beside: special_tokens.SpecialTokens) -> list[str]:
    """Adds the tokens that the file lacks, or has with other flags; returns them as they print."""
    import tokenizers

    have = {known.content: known for known in self._model.get_added_tokens_decoder().values()}
    new = []
    for text in beside.table | beside.named:
      flags = beside.named.get(text, {})
      if text in have:
        flags = {flag: getattr(have[text], flag) for flag in special_tokens.FLAGS}
      flags = flags | beside.table.get(text, {})
      flags |= {"special": True} if text in beside.named else {}
      if have.get(text) != (wanted := tokenizers.AddedToken(text, **flags)):
        new.append(wanted)
    self._model.add_tokens(new)
    return [repr(added) for added in new]

  def encode(self, text: bytes | str) -> np.ndarray:
    return np.array(self._ids([text])[0], np.int64)

  def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    return [np.array(ids, np.int64) for ids in self._ids(texts)]

  def _ids(self, texts: Sequence[bytes | str]) -> list[list[int]]:
    plain = [_to_str(text) for text in texts]
    try:
      return [x.ids for x in self._model.encode_batch_fast(plain, add_special_tokens=False)]
    except Exception as error:  # bare; a vocabulary without a piece for unknown characters
      raise UserError(
        f"config.data.tokenizer={self._path!r} cannot encode a text: {_why(error)}"
      ) from error

  @property
  def before(self) -> list[int]:
    encoded = self._model.encode("a", add_special_tokens=True)
    pairs = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
    return [i for i, _ in itertools.takewhile(lambda pair: pair[1], pairs)]

  def encode_special(self, text: str) -> list[int]:
    self._model.encode_special_tokens = False
    try:
      return self._ids([text])[0]
    finally:
      self._model.encode_special_tokens = True

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    if self._byte_level:
      return super().decode(ids)
    return self._model.decode(self._text_ids(ids))


class SentencePiece(Tokenizer):
  """A .model file of the package `sentencepiece`."""

  def __init__(self, path: str):
    import sentencepiece

    self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    self._beside = special_tokens.read_special_tokens(pathlib.Path(path).parent)
    size = self._model.vocab_size()
    pieces = [self._model.id_to_piece(i) for i in range(size)]
    own = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
    names = self._beside.names
    ids = (pieces.index(names[n]) if names.get(n) in pieces else i for n, i in own.items())
    ends = [i for i in ids if i >= 0]
    separator = ends[0] if ends else size
    pieces_V = [
      b"" if self._model.is_control(i) else _metaspace(piece) for i, piece in enumerate(pieces)
    ]
    if self._model.unk_id() >= 0:
      pieces_V[self._model.unk_id()] = "\ufffd".encode()
    super().__init__(pieces_V + [b""] * (separator == size), separator, _fingerprint(path))
    self.ends = sorted({*self._beside.ends, *ends[-1:]})
    self.eos = ends[-1] if ends else separator

  @property
  def before(self) -> list[int]:
    return [self.separator] if self._beside.begins else []

  def encode(self, text: bytes | str) -> np.ndarray:
    return np.array(self._model.encode(_to_str(text)), np.int64)

  def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    found = self._model.encode([_to_str(text) for text in texts], num_threads=-1)
    return [np.array(ids, np.int64) for ids in found]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._model.decode(self._text_ids(ids))


def load_tokenizer(config: Data) -> Tokenizer:
  """Returns the tokenizer that config.tokenizer names; raises a UserError if it cannot be read."""
  name = config.tokenizer
  if name == "bytes":
    return Bytes()
  kinds = {".json": HuggingFace, ".model": SentencePiece}
  kind = kinds.get(os.path.splitext(name)[1])
  if kind is None:
    raise UserError(
      f"config.data.tokenizer={name!r} is neither 'bytes' nor a path that ends in .json "
      "(Hugging Face tokenizers) or .model (SentencePiece)"
    )
  if not os.path.isfile(name):
    why = "no regular file" if os.path.exists(name) else "no such file"
    raise UserError(f"config.data.tokenizer={name!r}: {why}")
  try:
    return kind(name)
  except UserError:
    raise
  except ImportError as error:
    raise UserError(
      f"config.data.tokenizer={name!r} needs a package: pip install {error.name}"
    ) from None
  except Exception as error:  # both libraries raise bare Exception or RuntimeError
    raise UserError(
      f"config.data.tokenizer={name!r} is not a {kind.__name__} file, or is damaged: {_why(error)}"
    ) from error


def shown(piece: bytes) -> str:
  """Returns the bytes of a token as text: U+FFFD for what is no UTF-8, <|begin|> for none."""
  return piece.decode(errors="replace") or "<|begin|>"


def check_fits(config: Config) -> Tokenizer:
  """Returns the tokenizer of a run; raises a UserError if it has ids beyond the embedding."""
  tokenizer, rows = load_tokenizer(config.data), config.model.vocab_size
  if tokenizer.vocab_size > rows:
    invented = f" ({tokenizer.separator} begins a text: {special_tokens.CONFIG} names none)"
    raise UserError(
      f"config.model.vocab_size={rows} is less than the {tokenizer.vocab_size} of "
      f"config.data.tokenizer={config.data.tokenizer}; set it to {tokenizer.vocab_size} or more"
      + invented
      * (isinstance(tokenizer, HuggingFace) and not tokenizer.separator_text)
    )
  return tokenizer


def _why(error: Exception) -> str:
  return f"{type(error).__name__} {' '.join(str(error).split())}"[:200]


def _to_str(text: bytes | str) -> str:
  return text if isinstance(text, str) else text.decode(errors="replace")


def _fingerprint(path: str, beyond: str = "") -> str:
  """`beyond` says what files beside the tokenizer change in what it does."""
  return hashlib.sha256(pathlib.Path(path).read_bytes() + beyond.encode()).hexdigest()[:16]


def _metaspace(piece: str) -> bytes:
  """Returns the bytes of a piece, in which SentencePiece writes U+2581 for a space.

  A byte that has no piece is written as <0xE9>.
  """
  byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
  return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _byte_level(piece: str) -> bytes:
  return bytes(_BYTES[character] for character in piece)


# GPT-2's alphabet as {character: byte}: printable bytes are their own characters, the others are
# U+0100 and the characters after it.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
