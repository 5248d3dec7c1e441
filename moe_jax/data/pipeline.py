"""Turns documents into batches: tokenises them once into a file and reads rows of the file.

The stream is a separator and the tokens of each document, and one last separator. Row i has the
inputs stream[i*L : i*L+L] and the targets one place later, so every token but the first is a target
once.
"""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import grain
import numpy as np

from moe_jax.config import Data
from moe_jax.config.mixture import sources as sources_of
from moe_jax.data import builders, mixture, token_files, tokenizers
from moe_jax.data.documents import Documents
from moe_jax.errors import UserError, notice
from moe_jax.start import progress
from moe_jax.storage import cache

_VERSION = "7"  # of the stored files' layout; part of its cache key
_SECONDS = 30  # of tokenizing that a killed process has to do again
_BATCH, _BATCH_DOCUMENTS = 2**20, 1024  # bytes and documents that are tokenized together
_GZIP_WINDOW = 2**15  # bytes that DEFLATE can refer back to
Text = tuple[int, str, bytes]  # place, name, text of a document
Numbers = Sequence[int] | np.ndarray  # of rows
Array = TypeVar("Array")  # np.ndarray when rows are read, jax.Array inside a step


class Batch(NamedTuple, Generic[Array]):
  """Rows of tokens, int32. At padding the segment is 0, and so are the other fields."""

  tokens_BL: Array
  targets_BL: Array  # the next token; after a document's last token, the separator
  segments_BL: Array  # the number of the document in its row, from 1
  positions_BL: Array  # the place within the document's part of this row, from 0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
  """Rows of seq_len tokens of one split; documents follow each other and may cross rows."""

  stream_N: np.ndarray | mixture.Joined
  seq_len: int  # L
  tokenizer: tokenizers.Tokenizer
  num_documents: int
  num_bytes: int  # UTF-8 bytes of all documents
  digest: str  # of the stream: the same for equal data, split and tokenizer
  domains: tuple[str, ...] = ()  # labels of documents, the same in every split; () if unlabelled
  # Of each document, int64: where in the stream its separator stands, its index in `domains` or -1,
  # and the number by which `name` finds it.
  starts_M: np.ndarray
  domain_M: np.ndarray
  source_M: np.ndarray
  name: Callable[[int], str] = "document {}".format
  parts: tuple[mixture.Part, ...] = ()  # of a mixture

  def __len__(self) -> int:
    return -(-self.num_targets // self.seq_len)

  @property
  def num_targets(self) -> int:
    """The number of targets in all rows."""
    return len(self.stream_N) - 1

  @property
  def num_full(self) -> int:
    """The number of rows without padding: all rows, or all but the last."""
    return self.num_targets // self.seq_len

  def batch(self, rows_B: Numbers) -> Batch[np.ndarray]:
    """Returns the rows with these numbers; -1 stands for a row of padding."""
    tokens_BM = np.zeros((len(rows_B), self.seq_len + 1), np.int32)
    length_B = np.zeros(len(rows_B), np.int32)
    for b, row in enumerate(rows_B):
      if not -1 <= row < len(self):
        raise IndexError(f"row {row} of {len(self)}")
      if row >= 0:
        start = int(row) * self.seq_len
        piece = self.stream_N[start : start + self.seq_len + 1]
        tokens_BM[b, : len(piece)] = piece
        length_B[b] = len(piece) - 1
    column_L = np.arange(self.seq_len, dtype=np.int32)
    real_BL = column_L < length_B[:, None]
    starts_BL = tokens_BM[:, :-1] == self.tokenizer.separator
    starts_BL[:, 0] = True  # a row may begin inside a document
    segments_BL = np.cumsum(starts_BL, axis=1, dtype=np.int32)
    positions_BL = column_L - np.maximum.accumulate(np.where(starts_BL, column_L, 0), axis=1)
    return Batch(
      tokens_BL=tokens_BM[:, :-1] * real_BL,
      targets_BL=tokens_BM[:, 1:] * real_BL,
      segments_BL=segments_BL * real_BL,
      positions_BL=positions_BL * real_BL,
    )

  def documents_BL(self, rows_B: Numbers) -> np.ndarray:
    """Returns the number of each target's document, int32; -1 at padding.

    The separator after a document belongs to it: the model has to say where it ends.
    """
    index_BL = np.array(rows_B)[:, None] * self.seq_len + np.arange(self.seq_len)
    real_BL = (index_BL >= 0) & (index_BL < self.num_targets)
    document_BL = np.searchsorted(self.starts_M, index_BL, side="right") - 1
    return np.where(real_BL, document_BL, -1).astype(np.int32)

  def domains_BL(self, rows_B: Numbers) -> np.ndarray:
    """Returns the domain of each position's document, int32; -1 at padding and without a domain."""
    document_BL = self.documents_BL(rows_B)
    return np.where(document_BL >= 0, self.domain_M[document_BL], -1).astype(np.int32)

  def texts(self, numbers: Numbers) -> Iterator[tuple[bytes, bytes]]:
    """Yields the text that the targets of these rows spell, cut where documents end.

    Args:
      numbers: the rows' numbers, in rising order. Adjacent rows make one piece of text.

    Yields:
      (context, text): `context` is the text that precedes `text` in the same document, at most
      the 32 KiB that gzip can refer back to; it is empty at the beginning of a document.
    """
    rows_N = np.asarray(numbers)
    for run_N in np.split(rows_N, np.flatnonzero(np.diff(rows_N) != 1) + 1):
      first = int(run_N[0]) * self.seq_len + 1
      last = min((int(run_N[-1]) + 1) * self.seq_len + 1, len(self.stream_N))
      targets_N = np.asarray(self.stream_N[first:last])
      begin = int(self.starts_M[np.searchsorted(self.starts_M, first, side="left") - 1]) + 1
      decode = self.tokenizer.decode_bytes
      context = decode(self.stream_N[max(begin, first - _GZIP_WINDOW) : first])
      cuts = np.flatnonzero(targets_N == self.tokenizer.separator)
      for ids in np.split(targets_N, cuts):
        if text := decode(ids):
          yield context[-_GZIP_WINDOW:], text
        context = b""


def load_rows(config: Data, split: str) -> Rows:
  """Returns the rows of `split`: train, validation or test.

  The first call tokenises the text. Later ones compare what is stored with its checksums, and what
  is damaged is tokenised again. The caller must check that the tokenizer's ids fit the model.

  Raises:
    UserError: the config's data set, split or tokenizer cannot be read.
  """
  if config.mixture:
    return _mixed(config, split)
  tokenizer = tokenizers.load_tokenizer(config)
  documents = builders.prepare(config, split)
  label = f"{config.name} {getattr(config, split + '_split')}"
  key = cache.key(_VERSION, documents.identity, tokenizer.fingerprint)
  name = re.sub(r"[^\w.-]+", "_", label)[:100]  # a sum of many splits would be too long for a name
  stored = cache.build_once(
    cache.directory() / "tokens" / f"{name}-{key}",
    lambda folder: _tokenize(documents, tokenizer, label, folder),
    token_files.read_tokens,
  )
  return Rows(seq_len=config.seq_len, tokenizer=tokenizer, domains=documents.domains, **stored)


def _mixed(config: Data, split: str) -> Rows:
  """Returns the rows of all sources of a mixture, which are the domains of their documents."""
  sources = sources_of(config)
  rows = [load_rows(source.data, split) for source in sources]
  stream_N = mixture.Joined([source.stream_N for source in rows])
  spans = mixture.spans(stream_N.begins, config.seq_len)
  parts = [mixture.Part(s.label, s.weight, span) for s, span in zip(sources, spans, strict=True)]
  if split == "train" and (short := [part.label for part in parts if not part.rows]):
    raise UserError(
      f"config.data.mixture={config.mixture!r}: {short[0]} has no row of config.data.seq_len="
      f"{config.seq_len}; make it smaller or give more text"
    )
  firsts = np.cumsum([0, *(source.num_documents for source in rows)])

  def name(number: int) -> str:
    place = int(np.searchsorted(firsts, number, side="right")) - 1
    source = rows[place]
    return f"{sources[place].label}/{source.name(int(source.source_M[number - firsts[place]]))}"

  begins = zip(rows, [0, *(stream_N.begins[1:-1] - 1)], strict=True)
  return Rows(
    stream_N=stream_N,
    seq_len=config.seq_len,
    tokenizer=rows[0].tokenizer,
    num_documents=int(firsts[-1]),
    num_bytes=sum(source.num_bytes for source in rows),
    digest=hashlib.sha256(" ".join(source.digest for source in rows).encode()).hexdigest(),
    domains=tuple(source.label for source in sources),
    starts_M=np.concatenate([source.starts_M + begin for source, begin in begins]),
    domain_M=np.repeat(np.arange(len(rows)), np.diff(firsts)),
    source_M=np.arange(firsts[-1]),
    name=name,
    parts=tuple(parts),
  )


def _tokenize(
  documents: Documents, tokenizer: tokenizers.Tokenizer, label: str, folder: pathlib.Path
) -> None:
  """Writes the tokens of all documents, and says how far it is and what it has done."""
  dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
  start = saved = time.monotonic()
  count, texts = documents.read()
  told = progress.Progress(f"tokenizing {label}:", count, "documents")
  with token_files.TokenWriter(folder, dtype, tokenizer.separator) as writer:
    sums = writer.sums
    bytes_before = sums["bytes"]
    if before := sums["read"]:
      notice(f"tokenizing {label}: goes on after {before:,} of {count:,} documents")
      collections.deque(itertools.islice(texts, before), maxlen=0)  # reads them, and no more
      start = time.monotonic()
      told.begin_at(before)
    for batch in _batched(texts):
      _add(batch, documents, tokenizer, label, writer)
      rate = (sums["bytes"] - bytes_before) / (time.monotonic() - start)
      told.at(sums["read"], f"{rate / 1e6:,.1f} MB/s")
      if time.monotonic() - saved > _SECONDS:
        writer.save()
        saved = time.monotonic()
    if not sums["documents"]:
      raise UserError(f"{label}: no document there has text; name another split, or give some text")
    writer.finish()
  empty = sums["empty"]
  left_out = f"; left out {empty:,} documents without text" if empty else ""
  notice(
    f"tokenized {label}: {sums['documents']:,} documents, {sums['bytes']:,} bytes, "
    f"{sums['tokens']:,} tokens, {time.monotonic() - start:.1f} s{left_out}"
  )
  if not 0.99 * sums["bytes"] <= sums["counted"] <= 1.01 * sums["bytes"] + sums["documents"]:
    notice(f"note: this tokenizer changes the text: its tokens stand for {sums['counted']:,} bytes")


def _batched(texts: Iterator[Text]) -> Iterator[list[Text]]:
  """Yields documents together that a tokenizer's threads share."""
  batch, size = [], 0
  for document in texts:
    batch.append(document)
    size += len(document[2])
    if size >= _BATCH or len(batch) >= _BATCH_DOCUMENTS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _add(
  batch: list[Text],
  documents: Documents,
  tokenizer: tokenizers.Tokenizer,
  label: str,
  writer: token_files.TokenWriter,
) -> None:
  """Writes the documents that are not empty, in tokens, and counts them."""
  full = [document for document in batch if document[2]]
  writer.sums.update(read=len(batch), empty=len(batch) - len(full))
  encoded = tokenizer.encode_all([text for _, _, text in full])
  for (place, name, text), ids_N in zip(full, encoded, strict=True):
    if (ids_N == tokenizer.separator).any():
      raise UserError(
        f"{label}: {name or f'document {place}'} spells the separator, the id "
        f"{tokenizer.separator} of the tokenizer, which only begins documents; take it out of "
        "the text"
      )
    counted = int(tokenizer.bytes_V[ids_N].sum())
    writer.sums.update(documents=1, bytes=len(text), tokens=len(ids_N), counted=counted)
    writer.add(token_files.Encoded(place, name, documents.domain(name), len(text), ids_N))


def train_iterator(
  rows: Rows, config: Data, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
  """Returns endless batches of this process's rows, in a new order each epoch.

  A batch has batch_size / process_count rows. Global batch n has the same rows in the same places
  for any process_count. get_state and set_state resume exactly; the state is the number of batches
  taken, so it does not depend on process_count.

  Raises:
    UserError: the split has fewer full rows than a batch, or a batch does not split over processes.
  """
  local, rest = divmod(config.batch_size, process_count)
  if rest:
    raise UserError(
      f"config.data.batch_size={config.batch_size} does not split over {process_count} processes"
    )
  if rows.num_full < config.batch_size:
    raise UserError(
      f"config.data.train_split={config.train_split!r} has {rows.num_full} rows of "
      f"config.data.seq_len={config.seq_len}, fewer than config.data.batch_size="
      f"{config.batch_size}; make one of them smaller or give more text"
    )
  # Batch j of `local` rows belongs to process j % process_count. The endless order has the greatest
  # length that there is; a remainder of it, rounded up, would be one more.
  batches = _order(rows, config).batch(local, drop_remainder=True)
  batches = batches[process_index::process_count].map(rows.batch)
  options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=2 * config.threads)
  return iter(batches.to_iter_dataset(options))


def _order(rows: Rows, config: Data) -> grain.MapDataset:
  """Returns the numbers of the training rows, endlessly, in a new order each epoch."""
  if rows.parts:
    return mixture.order(rows.parts, config.seed)
  return grain.MapDataset.range(rows.num_full).seed(config.seed).shuffle().repeat()


def batch_rows(rows: Rows, config: Data, number: int) -> list[int]:
  """Returns the numbers of the rows in the global batch of this number, from 0."""
  order, first = _order(rows, config), number * config.batch_size
  return [int(order[place]) for place in range(first, first + config.batch_size)]


def next_number(batches: grain.DatasetIterator) -> int:
  """Returns the number of the batch that the iterator of `train_iterator` gives next."""
  return batches.get_state()["next_index"]


def skip_to(batches: grain.DatasetIterator, number: int) -> None:
  """Moves the iterator of `train_iterator`, so that it gives the batch of this number next."""
  batches.set_state(batches.get_state() | {"next_index": number})


def spread(available: int, count: int) -> np.ndarray:
  """Returns at most `count` of the numbers below `available`, int64, rising and evenly spaced."""
  count = min(count, available)
  return (2 * np.arange(count) + 1) * available // (2 * max(count, 1))


def eval_rows(rows: Rows, batch_size: int, num_batches: int) -> np.ndarray:
  """Returns the numbers of the rows that an evaluation reads, int64, in rising order.

  num_batches * batch_size rows, spread evenly over the split, since its files differ: the first
  ones alone can be much easier than the rest. 0 batches, or more than there are, is every row. The
  numbers depend on nothing else, so runs on any mesh read the same text.
  """
  return spread(len(rows), num_batches * batch_size or len(rows))


def eval_batches(numbers: Numbers, batch_size: int) -> Iterator[np.ndarray]:
  """Yields the row numbers of each batch; -1 pads the last batch."""
  padded = np.full(-(-len(numbers) // batch_size) * batch_size, -1)
  padded[: len(numbers)] = numbers
  yield from padded.reshape(-1, batch_size)


def gzip_bits_per_byte(rows: Rows, numbers: Numbers) -> float:
  """Returns a baseline without a model: gzip -9's bits for these rows over their bytes.

  Every document is compressed by itself. What a row costs is what it adds to the compressed size
  of the text before it, so that the costs of all rows sum to about those of whole files.
  """
  size = num_bytes = 0
  for context, text in rows.texts(numbers):
    gzip = zlib.compressobj(9, wbits=31)  # 31: the header and checksum of gzip
    head = len(gzip.compress(context))
    before = head + len(gzip.copy().flush()) if context else 0
    size += head + len(gzip.compress(text)) + len(gzip.flush()) - before
    num_bytes += len(text)
  return 8 * size / max(num_bytes, 1)
