"""Tables and compressed lines as text: what is read, in which split, in how much memory."""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import tempfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from moe_jax.config import Data
from moe_jax.data import text_files
from tests.support.scripts import python
from tests.support.texts import SPLITS, error_of, everything, joined, load

TEXTS = [f"row {i} says naïve {i * i}\n" for i in range(400)]


def as_parquet(table, path):
  parquet.write_table(table, path, row_group_size=70)


def as_stream(table, path):
  with pyarrow.ipc.new_stream(path, table.schema) as file:
    file.write_table(table, 30)


def as_file(table, path):
  with pyarrow.ipc.new_file(path, table.schema) as file:
    file.write_table(table, 30)


KINDS = {"x.parquet": as_parquet, "x.arrow": as_stream, "x.feather": as_file}
COLUMNS = {
  "string": TEXTS,
  "large_string": pyarrow.array(TEXTS, pyarrow.large_string()),
  "binary": [text.encode() for text in TEXTS],
  "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
}


def table_of(values, **more):
  return pyarrow.table({"text": values, **more})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("column", COLUMNS)
def test_each_row_is_a_document_in_the_split_of_its_hash(name, column, text):
  numbers = list(range(len(TEXTS)))
  KINDS[name](table_of(COLUMNS[column], n=numbers), pathlib.Path(text.path) / name)
  rows = load(text)
  for split in SPLITS:
    want = [t for i, t in enumerate(TEXTS) if text_files.split_of(f"{name}:{i}") == split]
    assert everything(rows[split]) == [t.encode() for t in want]  # in the order of the rows
    assert rows[split].name(0).startswith(f"{name}:")
  part = everything(load(dataclasses.replace(text, train_split="train[:50%]"))["train"])
  whole = everything(rows["train"])
  assert len(part) == len(whole) // 2 and [t for t in whole if t in part] == part


def test_the_field_of_a_struct_is_a_column(text):
  """And a column of that very name comes first."""
  messages = [{"role": "user", "text": t} for t in TEXTS]
  path, column = pathlib.Path(text.path) / "x.parquet", {"message.text": ["flat"] * len(TEXTS)}
  for more, want in (({}, TEXTS), (column, ["flat"] * len(TEXTS))):
    as_parquet(pyarrow.table({"message": messages} | more), path)
    rows = load(dataclasses.replace(text, column="message.text"))
    assert sorted(joined(map(everything, rows.values()))) == sorted(t.encode() for t in want)


def test_rows_without_text_are_left_out_and_counted(text, capfd):
  values = [None if i % 4 == 1 else " \n" if i % 4 == 2 else t for i, t in enumerate(TEXTS)]
  as_parquet(table_of(values), pathlib.Path(text.path) / "x.parquet")
  rows = load(text)
  want = [t.encode() for i, t in enumerate(TEXTS) if i % 4 in (0, 3)]
  assert sorted(joined(map(everything, rows.values()))) == sorted(want)
  counts = re.findall(r"left out (\d+) documents without text", capfd.readouterr().err)
  assert len(counts) == 3 and sum(map(int, counts)) == 200


HUB = {
  "data/train-00000-of-00002.parquet": "train",
  "data/train-00001-of-00002.parquet": "train",
  "data/validation-00000-of-00001.parquet": "validation",
}


def test_files_of_a_hub_name_their_splits(text, capfd):
  """What no file is named for, here the test split, is a part of the training text by hash."""
  root = pathlib.Path(text.path)
  (root / "data").mkdir()
  for name in HUB:
    as_parquet(table_of([f"{name} {t}" for t in TEXTS]), root / name)
  (root / "README.md").write_text("# A data set\n")
  rows = load(text)
  found = {split: [t.decode() for t in everything(rows[split])] for split in SPLITS}
  validation = [t for t in found["validation"] if t.startswith("data/validation")]
  assert len(validation) == len(found["validation"]) == 400
  assert len(found["train"]) + len(found["test"]) == 800 and 20 < len(found["test"]) < 70
  assert all(t.startswith("data/train") for t in found["train"] + found["test"])
  said = capfd.readouterr().err
  assert "the files' names say the split: train 2, validation 1; what" in said
  assert "beside tables: README.md\n" in said


@pytest.mark.parametrize(("name", "split"), [
  ("train/test-set-of-bugs.parquet", "train"), ("x/c4-validation.0-of-8.json.gz", "validation"),
  ("dev/part-0.parquet", "validation"), ("test_0.arrow", "test"), ("x/latest.parquet", None),
])  # fmt: skip
def test_the_split_that_a_name_says(name, split):
  files = text_files.UserFiles(pathlib.Path(), {name: (1, 1), "train.parquet": (1, 1)}, [])
  assert text_files.named_splits(files).get(name) == split


def test_names_of_compressed_files_decide_beside_others(text):
  root = pathlib.Path(text.path)
  for split in ("train", "test"):
    lines = "".join(json.dumps({"text": f"{split} {t}"}) + "\n" for t in TEXTS)
    (root / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
  (root / "README.md").write_text("train: a data set\n")
  found = {split: [t.decode() for t in everything(rows)] for split, rows in load(text).items()}
  assert len(found["test"]) == 400 and all(t.startswith("test ") for t in found["test"])
  assert all(t.startswith("train") for t in found["train"] + found["validation"])


def test_a_split_without_text_is_refused(text):
  root = pathlib.Path(text.path)
  as_parquet(table_of(TEXTS), root / "train.parquet")
  as_parquet(table_of(["", None, "  "]), root / "validation.parquet")
  assert load(dataclasses.replace(text, validation_split="train"))["train"].num_documents > 300
  message = error_of(text, "validation")
  assert message.startswith("text validation: no document there has text")


def test_a_pattern_names_files(text):
  root = pathlib.Path(text.path)
  for name in ("a/1.parquet", "b/2.parquet", "b/3.arrow"):
    (root / name).parent.mkdir(exist_ok=True)
    KINDS[f"x{pathlib.Path(name).suffix}"](table_of([f"{name} {t}" for t in TEXTS]), root / name)
  rows = load(dataclasses.replace(text, path=f"{root}/*/*.parquet"))
  found = joined(map(everything, rows.values()))
  assert len(found) == 800 and not any(t.startswith(b"b/3") for t in found)
  assert rows["train"].domains == ("a", "b")
  message = error_of(dataclasses.replace(text, path=f"{root}/*.parquet"))
  assert "no such file or folder" in message


LISTS = [[{"role": "user"}]] * 3
REFUSED = {
  "no such column": (table_of(TEXTS, body=TEXTS), "x", ["no such column", "text: text, body"]),
  "numbers": (pyarrow.table({"text": [1], "b": ["x"]}), "text", ["not text", "of text: b"]),
  "lists": (pyarrow.table({"text": LISTS}), "text", ["list<", "of text: none"]),
  "twice": (pyarrow.table([["a"], ["b"]], ["text", "text"]), "text", ["column twice; rename one"]),
  "a struct": (pyarrow.table({"m": [{"x": "a"}]}), "m", ["struct<", "columns of text: m.x"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_columns_that_hold_no_text_are_refused(case, name, text):
  table, column, parts = REFUSED[case]
  KINDS[name](table, pathlib.Path(text.path) / name)
  message = error_of(dataclasses.replace(text, column=column))
  assert message.startswith(f"config.data.column={column!r}: {text.path}/{name} has ")
  assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("damage", ["cut", "empty", "another"])
def test_a_damaged_table_is_refused(name, damage, text):
  path = pathlib.Path(text.path) / name
  KINDS[name](table_of(TEXTS), path)
  whole = path.read_bytes()
  path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "another": b"hello\n"}[damage])
  message = error_of(text)
  assert message.startswith(f"config.data.path={text.path!r}: {path} cannot be read (")
  assert message.endswith("; mend or remove it")


def test_bytes_that_are_no_utf8_are_refused(text):
  as_parquet(table_of([b"\xff\xfe"] * 20), pathlib.Path(text.path) / "x.parquet")
  assert re.search(r"x\.parquet, row \d+, is not UTF-8 text; convert it", error_of(text))


def zstd(data):
  half = len(data) // 2  # of two frames, as those that are appended
  codec = pyarrow.Codec("zstd")
  return b"".join(codec.compress(part, asbytes=True) for part in (data[:half], data[half:]))


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_lines_are_those_lines(ending, text):
  lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
  root = pathlib.Path(text.path)
  path = root / f"x.jsonl{ending}"
  path.write_bytes(COMPRESS[ending](lines))
  (root / f"book.txt{ending}").write_bytes(COMPRESS[ending](b"a whole book\n"))
  found = joined(map(everything, load(text).values()))
  assert sorted(found) == sorted([b"a whole book\n", *(t.encode() for t in TEXTS)])
  path.write_bytes(COMPRESS[ending](lines)[:-9])
  message = error_of(text)
  assert f"{path} cannot be read (" in message and message.endswith("; mend or remove it")


_LIMITED = """
import resource, sys
from moe_jax.config import Data
from moe_jax.data import pipeline
import jax, pyarrow.parquet
jax.numpy.zeros(3).block_until_ready()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(status["VmData"].split()[0]) * 1024 + 300 * 10**6
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
rows = pipeline.load_rows(Data(name="text", path=sys.argv[1], seq_len=1024), "train")
print(rows.num_documents, rows.num_bytes, rows.batch([0, 10**5]).tokens_BL.shape)
"""


@pytest.mark.slow
def test_two_gigabytes_are_read_in_300_megabytes():
  """Beside jax; in one group of rows, which is the hardest to read by parts."""
  letters = np.random.default_rng(0).integers(97, 123, 10**6).astype(np.uint8).tobytes()
  texts = [(letters[i:] + letters[:i]).decode() for i in range(0, 10**6, 20_000)]
  table = pyarrow.table({"text": pyarrow.chunked_array([texts] * 40)})
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "x.parquet"
    parquet.write_table(table, path, 2**31, compression="none", use_dictionary=False)
    assert path.stat().st_size > 2e9 and parquet.ParquetFile(path).num_row_groups == 1
    done = python("-c", _LIMITED, path, env=os.environ | {"MOE_JAX_CACHE": f"{folder}/cache"})
  assert done.returncode == 0, done.stderr[-2000:]
  documents, num_bytes, _ = done.stdout.split(maxsplit=2)
  assert 1760 < int(documents) < 1840 and int(num_bytes) == int(documents) * 10**6


def test_a_file_that_names_no_training_text_is_split_by_hash(text):
  path = pathlib.Path(text.path) / "test.parquet"
  as_parquet(table_of(TEXTS), path)
  rows = load(Data(name="text", path=str(path)))
  assert all(rows[split].num_documents > 5 for split in SPLITS)
