"""Tokenizers: text comes back, every byte is counted, special tokens of the file stay out."""

import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from moe_jax.config import Data
from moe_jax.data import pipeline, tokenizers
from moe_jax.errors import UserError
from tests.support.texts import PROSE, S, error_of, everything


def train_bpe(path, special=()):
  hf = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  model.enable_truncation(4)  # as some published files do; load must undo it
  alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
  model.train_from_iterator(
    [PROSE],
    hf.trainers.BpeTrainer(
      vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    ),
  )
  if "<s>" in special:  # many files add it to each text; the separator stands there already
    model.post_processor = hf.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )
  model.save(str(path))
  return tokenizers.load_tokenizer(Data(tokenizer=str(path)))


def train_sentencepiece(path, **options):
  spm = pytest.importorskip("sentencepiece", reason="the tokenizers extra is not installed")
  with open(path, "wb") as file:
    spm.SentencePieceTrainer.train(
      sentence_iterator=iter(PROSE.splitlines()),
      model_writer=file,
      vocab_size=400,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      hard_vocab_limit=False,
      minloglevel=2,
      **options,
    )
  return tokenizers.load_tokenizer(Data(tokenizer=str(path)))


HARD = "def f(x):\n\treturn 'é日本'  # <s> <|endoftext|> 🙂\n\n  end"


def test_bytes_are_their_own_ids():
  bytes_ = tokenizers.load_tokenizer(Data())
  assert (bytes_.vocab_size, bytes_.separator) == (257, 256)
  ids = bytes_.encode("é")
  assert ids.tolist() == [0xC3, 0xA9] == bytes_.encode("é".encode()).tolist()
  assert bytes_.bytes_V.tolist() == [1] * 256 + [0]
  assert bytes_.decode([*ids, S, 65, 263]) == "éA"  # 263: padding of the model's vocabulary


@pytest.fixture
def bpe(tmp_path):
  """With special tokens, of which <s> comes before <|endoftext|>."""
  return train_bpe(tmp_path / "t.json", ["<pad>", "<|endoftext|>", "<s>"])


def test_special_tokens_of_a_bpe_have_no_bytes_and_one_is_the_separator(bpe):
  """The first that is known."""
  assert bpe.separator == 2 and bpe.vocab_size == 400
  assert bpe.bytes_V[:3].tolist() == [0, 0, 0]
  assert len(bpe.encode(PROSE)) < len(PROSE) / 2


@pytest.mark.parametrize("text", [PROSE, HARD], ids=["prose", "hard"])
def test_a_bpe_gives_text_back_and_counts_its_bytes(text, bpe):
  ids = bpe.encode(text)
  assert bpe.decode(ids) == text
  assert bpe.bytes_V[ids].sum() == len(text.encode())
  assert bpe.decode_bytes(ids[:-1]) == text.encode()[: bpe.bytes_V[ids[:-1]].sum()]
  assert not np.isin(ids, [0, 1, 2]).any()  # special tokens in the text are text


def test_a_bpe_without_special_tokens_gets_a_separator(tmp_path):
  bpe = train_bpe(tmp_path / "t.json")
  assert (bpe.separator, bpe.vocab_size) == (400, 401) == (len(bpe.bytes_V) - 1, 401)


def test_other_special_tokens_are_another_fingerprint(tmp_path):
  bpe, other = train_bpe(tmp_path / "t.json"), train_bpe(tmp_path / "u.json", ["<s>"])
  assert bpe.fingerprint != other.fingerprint


@pytest.fixture
def sentencepiece(tmp_path):
  return train_sentencepiece(tmp_path / "t.model")


@pytest.mark.parametrize("text", [PROSE, HARD], ids=["prose", "hard"])
def test_sentencepiece_gives_text_back_and_counts_its_bytes(text, sentencepiece):
  ids = sentencepiece.encode(text)
  assert sentencepiece.decode(ids) == text
  assert sentencepiece.decode_bytes(sentencepiece.encode("a é")) == " a é".encode()
  # The space before each document is one more.
  assert sentencepiece.bytes_V[ids].sum() == len(text.encode()) + 1
  assert sentencepiece.separator == 1 and 1 not in ids  # <s>
  assert sentencepiece.bytes_V[1:3].tolist() == [0, 0]  # <s>, </s>


def test_sentencepiece_without_bos_and_eos_gets_a_separator(tmp_path):
  model = train_sentencepiece(tmp_path / "t.model", bos_id=-1, eos_id=-1)
  assert model.separator == model.vocab_size - 1 == len(model.bytes_V) - 1
  assert model.bytes_V[model.separator] == 0
  assert model.decode([model.separator, *model.encode("fox")]) == "fox"


BEGIN = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "bos_token": "<s>",
  "eos_token": "<|im_end|>",
}
TABLE = {
  "0": {"content": "<|endoftext|>", "special": True},
  "1": {"content": "<s>", "special": True},
  "30": {"content": "<|im_end|>", "special": True, "lstrip": True},
  "31": {"content": "<think>", "special": False},
}
BESIDE = {
  "nothing": ({}, (0, 0, 0, [])),
  "a begin token, which no rule puts before a text": (
    {"tokenizer_config.json": BEGIN}, (1, 1, 25, [25])
  ),
  "the map, which counts without a table": (
    {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
     "special_tokens_map.json": BEGIN | {"eos_token": {"content": "</s>"}}}, (1, 1, 25, [25]),
  ),
  "a table, beside which the map is not read": (
    {"tokenizer_config.json": BEGIN | {"added_tokens_decoder": TABLE, "bos_token": None},
     "special_tokens_map.json": {"bos_token": "<s>"}}, (25, 25, 25, [25]),
  ),
  "an empty table, beside which the map is not read": (
    {"tokenizer_config.json": BEGIN | {"added_tokens_decoder": {}},
     "special_tokens_map.json": {"eos_token": "</s>"}}, (1, 1, 25, [25]),
  ),
  "flags of a name, and tokens of other names": (
    {"tokenizer_config.json": BEGIN | {
      "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "rstrip": True},
      "image_token": "<image>",
      "extra_special_tokens": {"audio_token": "<think>"}}}, (1, 1, 25, [25]),
  ),
  "a name that the file has as a token like others": (
    {"tokenizer_config.json": BEGIN | {"eos_token": "uv"}}, (1, 1, 24, [24])
  ),
  "ids that are none": (
    {"config.json": {"bos_token_id": -1, "eos_token_id": [True, 10**12, 3]}}, (0, 0, 0, [3])
  ),
  "the model's ids": (
    {"generation_config.json": {"eos_token_id": [5, 0]}, "config.json": {"bos_token_id": 1}},
    (1, 1, 1, [0, 5]),
  ),
  "the model of text in one of images": (
    {"config.json": {"text_config": {"eos_token_id": 5}}}, (0, 0, 0, [5])
  ),
}  # fmt: skip


def letters(folder, begins):
  """A tokenizer of a letter each, with two special tokens, of which one may stand before a text."""
  hf = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
  vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", "<s>", *"abcdefghijklmnopqrstuv"])}
  model = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="a"))
  model.pre_tokenizer = hf.pre_tokenizers.Split("", "isolated")
  model.add_special_tokens(["<|endoftext|>"])
  model.add_tokens(["uv"])
  if begins:
    model.post_processor = hf.processors.TemplateProcessing(
      single="<s> $A", special_tokens=[("<s>", 1)]
    )
  model.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_the_files_beside_a_tokenizer_name_its_special_tokens(name, begins, tmp_path):
  files, (separator, prefix, eos, ends) = BESIDE[name]
  letters(tmp_path, begins)
  for file, values in files.items():
    (tmp_path / file).write_text(json.dumps(values))
  ours = tokenizers.HuggingFace(str(tmp_path / "tokenizer.json"))
  assert (ours.separator, ours.prefix, ours.eos, ours.ends) == (separator, prefix, eos, ends)
  assert ours.before == [1] * begins
  assert ours.bytes_V[separator] == 0 and separator not in ours.encode("abuv<s><|im_end|>")
  theirs = pytest.importorskip(
    "transformers", reason="compares with Hugging Face: pip install -e '.[hf]'"
  ).AutoTokenizer.from_pretrained(tmp_path)
  names = (theirs.bos_token_id, theirs.eos_token_id)
  assert prefix == next((i for i in names if i is not None), separator)
  text = "ab<s>c <|im_end|> <think>vuv<image> a"
  assert theirs(text).input_ids == [*ours.before, *ours.encode_special(text)]


def test_another_tokenizer_makes_other_rows_of_the_same_text(text, tmp_path):
  (pathlib.Path(text.path) / "a.txt").write_text(PROSE)
  plain = pipeline.load_rows(text, "train")
  text = dataclasses.replace(text, tokenizer=str(tmp_path / "t.json"))
  bpe = train_bpe(tmp_path / "t.json", ["<s>"])
  rows = pipeline.load_rows(text, "train")
  assert rows.tokenizer.fingerprint == bpe.fingerprint
  assert rows.digest != plain.digest and rows.num_targets < plain.num_targets / 2
  assert everything(rows) == everything(plain)
  targets_BL = rows.batch([0]).targets_BL
  cut = b"".join(text for _, text in rows.texts([0]))
  assert cut and len(cut) == rows.tokenizer.bytes_V[targets_BL].sum()
  assert everything(plain)[0].startswith(cut)


@pytest.mark.parametrize(("name", "why"), [
  ("gpt2", "neither"), ("none.json", "no such file"), ("FOLDER/bad.json", "is not a"),
  ("FOLDER/bad.model", "is not a"), ("FOLDER/pipe.json", "no regular file"),
  ("FOLDER/pipe.model", "no regular file"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_is_refused(name, why, text, tmp_path):
  (tmp_path / "bad.json").write_text("{}")
  (tmp_path / "bad.model").write_text("x")
  os.mkfifo(tmp_path / "pipe.json")
  os.mkfifo(tmp_path / "pipe.model")
  name = name.replace("FOLDER", str(tmp_path))
  message = error_of(dataclasses.replace(text, tokenizer=name))
  assert f"config.data.tokenizer={name!r}" in message
  assert why in message or "pip install" in message


@pytest.mark.parametrize("kind", ["json", "model"])
def test_a_damaged_tokenizer_is_refused_in_one_line_or_is_another_one(kind, tmp_path):
  good = tmp_path / f"good.{kind}"
  whole = (train_bpe if kind == "json" else train_sentencepiece)(good)
  data, bad = good.read_bytes(), tmp_path / f"bad.{kind}"
  rng = np.random.default_rng(0)
  refused = 0
  for n in range(60):
    place = int(rng.integers(len(data)))
    damaged = bytearray(data[:place] if n % 3 == 0 else data)
    if n % 3:
      damaged[place] ^= 1 << n % 8
    bad.write_bytes(damaged)
    try:
      found = tokenizers.load_tokenizer(Data(tokenizer=str(bad)))
    except UserError as error:
      assert "\n" not in str(error) and f"{bad}" in str(error)
      refused += 1
    else:
      assert found.fingerprint != whole.fingerprint  # so the run is not continued with it
  assert refused > 20


def test_a_vocabulary_with_a_huge_id_is_refused(tmp_path):
  train_bpe(tmp_path / "t.json")
  values = json.loads((tmp_path / "t.json").read_text())
  values["model"]["vocab"]["far"] = 2**31
  (tmp_path / "t.json").write_text(json.dumps(values))
  with pytest.raises(UserError, match=r"id of 2,147,483,648 is over"):
    tokenizers.load_tokenizer(Data(tokenizer=str(tmp_path / "t.json")))


def test_text_that_a_vocabulary_cannot_spell_is_refused(tmp_path, text):
  hf = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
  words = hf.Tokenizer(hf.models.WordLevel({"known": 0}, unk_token="[UNK]"))
  words.save(str(tmp_path / "t.json"))
  (pathlib.Path(text.path) / "a.txt").write_text("unknown\n" * 99)
  message = error_of(dataclasses.replace(text, tokenizer=str(tmp_path / "t.json")))
  assert "t.json' cannot encode a text" in message


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "t.json").write_text("{}")
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(UserError, match="pip install tokenizers"):
    tokenizers.load_tokenizer(Data(tokenizer=str(tmp_path / "t.json")))


def test_marks_of_parts_of_words_are_refused(tmp_path):
  """They would be counted as bytes of the text."""
  hf = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
  path = str(tmp_path / "tokenizer.json")
  hf.Tokenizer(hf.models.WordPiece({"a": 0, "##b": 1, "?": 2}, unk_token="?")).save(path)
  with pytest.raises(UserError, match="marks parts of words by '##'"):
    tokenizers.load_tokenizer(Data(tokenizer=path))


def test_a_text_that_spells_the_separator_is_refused(tmp_path):
  """By a tokenizer that takes it for a word."""
  hf = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed")
  model = hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
  model.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
  model.add_special_tokens(["<s>"])
  model.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "text.txt").write_text("a a <s> a\n" * 40)
  config = Data(
    name="text",
    path=str(tmp_path / "text.txt"),
    seq_len=4,
    batch_size=1,
    tokenizer=str(tmp_path / "tokenizer.json"),
  )
  assert "text.txt spells the separator, the id 0" in error_of(config)


@pytest.mark.parametrize("make", [train_bpe, train_sentencepiece, lambda _: tokenizers.Bytes()])
def test_many_texts_are_encoded_as_each_alone(make, tmp_path):
  path = tmp_path / {train_bpe: "tokenizer.json"}.get(make, "x.model")
  tokenizer = make(path)
  texts = [text.encode() for text in (HARD, "", "x", *PROSE.splitlines(keepends=True))]
  found = tokenizer.encode_all(texts)
  assert [ids.tolist() for ids in found] == [tokenizer.encode(text).tolist() for text in texts]
