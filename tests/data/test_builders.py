"""Data sets by name: Python's sources, the TFDS catalog, records; and their error messages."""

import collections
import dataclasses
import json
import pathlib
import time

import pytest
import tensorflow_datasets as tfds

from moe_jax.config import Data
from moe_jax.data import builders, pipeline, text_files
from moe_jax.data import catalog as catalog_lib
from moe_jax.data.documents import Corpus
from moe_jax.data.text_files import split_of
from moe_jax.errors import DamagedError
from tests.support.texts import PROSE, SPLITS, error_of, everything, load, read
from tests.support.toys import ROOT


def test_python_stdlib_holds_each_file_in_the_split_of_its_hash(stdlib):
  root, names = text_files.stdlib()
  expected = collections.defaultdict(list)
  for name in names:
    content = (root / name).read_bytes()
    try:
      content.decode()
    except UnicodeDecodeError:
      continue
    if content:
      expected[split_of(name)].append(content)
  for split in SPLITS:
    found = read(builders.prepare(stdlib, split))
    assert sorted(found) == sorted(expected[split]), split
  assert len(expected["train"]) > 400
  assert len(expected["validation"]) >= 10 and len(expected["test"]) >= 10
  assert not any("site-packages" in name for name in names)


def test_parts_of_a_split_with_almost_one_name_stay_apart(text):
  lines = "\n".join(json.dumps({"text": f"{i}"}) for i in range(300))
  (pathlib.Path(text.path) / "a.jsonl").write_text(lines)
  for split, expected in {"train[:1%]": 3, "train[:1]": 1}.items():
    rows = pipeline.load_rows(dataclasses.replace(text, train_split=split), "train")
    assert rows.num_documents == expected


class Copy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What runs of before were trained on: TFDS's copy of the documents."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split):
    names = (f"a.jsonl:{number}" for number in range(1, 301))
    yield from ((name, {"text": name}) for name in names if split_of(name) == split)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  builder = Copy(data_dir=tmp_path_factory.mktemp("tfds"))
  with catalog_lib.quiet():
    builder.download_and_prepare(file_format="array_record")
  return builder


PARTS = """
train validation test all train[:1%] train[:90%] train[-10%:] train[5:20] train[99.5%:]
validation+test train[10%:20%]+test test+train[:3]+train[:2]
"""


@pytest.mark.parametrize("part", PARTS.split())
def test_the_documents_of_a_part_are_those_that_tfds_gives_in_its_order(part, text, copy):
  lines = (json.dumps({"text": f"a.jsonl:{number}"}) for number in range(1, 301))
  (pathlib.Path(text.path) / "a.jsonl").write_text("\n".join(lines))
  expected = [example["text"] for example in copy.as_data_source(part)]
  rows = pipeline.load_rows(dataclasses.replace(text, test_split=part), "test")
  assert everything(rows) == expected and len(expected) == rows.num_documents > 0
  assert [rows.name(m).encode() for m in rows.source_M] == expected


@pytest.mark.parametrize(
  "part", ["trian", "train[:0%]", "train[5:3]", "all[:2]", "train[900:]", "["]
)
def test_a_part_that_a_text_does_not_have_is_refused(part, text):
  (pathlib.Path(text.path) / "a.jsonl").write_text('{"text": "x"}\n' * 300)
  message = error_of(dataclasses.replace(text, test_split=part), "test")
  assert f"config.data.test_split={part!r} is not a split of config.data.name='text'" in message
  assert "the splits are: train, validation, test" in message


@pytest.fixture
def counting(own_cache, monkeypatch):
  """A data set of three documents in each of two domains, in each split, under a new name."""

  def documents(left_out, keep):
    words = ((word, split, i) for word in "ab" for split in SPLITS for i in range(3))
    yield from ((f"{word}/{split}/{i}", f"{word} {split} {i}") for word, split, i in words)

  def corpus(config):
    return Corpus("counting", documents, ("a", "b"), lambda name: name.split("/")[1])

  monkeypatch.setitem(builders.DATASETS, "counting", builders.Dataset(corpus, ""))
  return Data(name="counting")


def test_a_data_set_is_one_record_and_is_suggested_for_a_name_like_its_own(counting):
  rows = load(counting)
  for split in SPLITS:
    want = [f"{word} {split} {i}".encode() for i in range(3) for word in "ab"]
    assert sorted(everything(rows[split])) == sorted(want)
    assert rows[split].domains == ("a", "b") and sorted(rows[split].domain_M) == [0] * 3 + [1] * 3

  assert "similar names: counting" in error_of(dataclasses.replace(counting, name="countin"))


def test_the_guide_shows_every_data_set():
  guide = (ROOT / "docs/guide.md").read_text()
  for name, record in builders.DATASETS.items():
    assert f"| `{name}` | {record.about} |" in guide


@pytest.fixture
def catalog(tmp_path, monkeypatch):
  """$TFDS_DATA_DIR with TFDS's own tiny_shakespeare, prepared from a text of ours."""
  cls = tfds.builder_cls("tiny_shakespeare")
  splits = {"train": PROSE, "validation": "To be\n", "test": "or not\n"}
  with monkeypatch.context() as patch, catalog_lib.quiet():
    patch.setattr(
      cls,
      "_split_generators",
      lambda self, _: {k: self._generate_examples(k, v) for k, v in splits.items()},
    )
    builder = cls(data_dir=tmp_path / "tfds")
    builder.download_and_prepare(file_format="array_record")
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  return Data(name="tiny_shakespeare")


def test_a_prepared_catalog_set_is_read_by_its_name(catalog, capfd):
  rows = load(catalog)
  assert [everything(rows[s]) for s in SPLITS] == [[PROSE.encode()], [b"To be\n"], [b"or not\n"]]
  said = capfd.readouterr()
  assert said.out == "" and len(said.err.splitlines()) == 3


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 16
  path.write_bytes(data)


@pytest.mark.parametrize(
  ("file", "place"), [("*-train.array_record*", 100), ("dataset_info.json", 2)]
)
def test_a_damaged_catalog_set_is_refused_in_one_line(file, place, catalog, tmp_path):
  """It may be the user's only copy, so it is not removed."""
  folder = tmp_path / "tfds/tiny_shakespeare"
  (path,) = folder.glob(f"1.0.0/{file}")
  flip(path, place)
  with pytest.raises(DamagedError) as caught:
    pipeline.load_rows(catalog, "train")
  message = str(caught.value)
  assert str(folder) in message and "delete that folder" in message and "\n" not in message
  assert path.exists()


def test_splits_of_a_catalog_set_can_be_added(catalog):
  both = dataclasses.replace(catalog, train_split="test+validation")
  assert sorted(everything(pipeline.load_rows(both, "train"))) == [b"To be\n", b"or not\n"]


@pytest.mark.parametrize(
  ("field", "value", "known"),
  [
    ("test_split", "tset", "train, validation, test"),
    ("test_split", "test[:0%]", ""),
    ("column", "body", "has: text"),
  ],
)
def test_what_a_catalog_set_does_not_have_is_refused(field, value, known, catalog):
  message = error_of(dataclasses.replace(catalog, **{field: value}), "test")
  assert f"config.data.{field}={value!r}" in message and known in message


def test_a_set_in_another_file_format_is_refused(catalog, tmp_path):
  info = tmp_path / "tfds/tiny_shakespeare/1.0.0/dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  message = error_of(catalog)
  assert "prepared as tfrecord" in message and "array_record" in message


@pytest.mark.parametrize("name, hint", [
  ("tiny_shakespear", "similar names: tiny_shakespeare"),
  ("pyton_stdlib", "similar names: python_stdlib"),
  ("my data", "Parsing"),
  ("lm1b:9.9.9", "1.1.0"),
  ("huggingface:foo", "community"),
  ("tiny_shakespeare/data_dir=/tmp", "data_dir"),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_a_hint(name, hint, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  message = error_of(Data(name=name))
  assert f"config.data.name={name!r}" in message and hint in message


@pytest.mark.parametrize("name", ["tiny_shakespeare", "lm1b", "c4/en", "wikipedia/20230601.en"])
def test_a_name_of_the_catalog_without_network_is_refused(name, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  for scheme in ("HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "http_proxy"):
    monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nobody listens there
  message = error_of(Data(name=name))
  for part in (f"config.data.name={name!r}", "no network", "python_stdlib", str(tmp_path)):
    assert part in message


def test_a_lookup_that_hangs_counts_as_offline():
  start = time.monotonic()
  assert not catalog_lib._online(lambda *_, **__: time.sleep(20), seconds=0.2)
  assert time.monotonic() - start < 15
  assert catalog_lib._online(lambda *_, **__: None)
