"""Small files: whole or not at all, through no link, and one line for what is damaged."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from moe_jax.errors import DamagedError, StorageError
from moe_jax.storage import files
from tests.support.scripts import python
from tests.support.toys import ROOT


def test_nothing_is_written_through_a_link(tmp_path):
  target, link = tmp_path / "target", tmp_path / "link"
  target.write_text("mine")
  link.symlink_to(target)
  (tmp_path / "link.new").symlink_to(target)  # the name under which it is written first
  files.write(link, "new")
  assert target.read_text() == "mine" and link.read_text() == "new" and not link.is_symlink()
  other = tmp_path / "other"
  other.symlink_to(target)
  with pytest.raises(StorageError, match=f"cannot write {other}"):
    files.append_line(other, {"step": 1})
  assert target.read_text() == "mine"


WRITE = """
import pathlib, sys
from moe_jax.storage import files
print("ready", flush=True)
for number in range(1_000_000):
  files.write_json(pathlib.Path(sys.argv[1]), {"number": number, "more": "x" * 20_000})
"""


def test_a_kill_leaves_the_old_contents_or_the_new_ones(tmp_path):
  path, rng = tmp_path / "value.json", random.Random(0)
  for _ in range(5):
    process = subprocess.Popen(
      [sys.executable, "-c", WRITE, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    while not path.exists():
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.communicate()
    assert len(files.read_json(path, "")["more"]) == 20_000


FULL = """
import pathlib, resource, signal, sys
from moe_jax import errors
from moe_jax.storage import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path = pathlib.Path(sys.argv[1])
for write, value in ((files.write, "x" * 5000), (files.append_line, {"x": "y" * 5000})):
  try:
    write(path, value)
  except errors.StorageError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_one_line_and_the_old_one_stays(tmp_path):
  """A limit on the size of files stands for a full disk, which not every machine lets us make."""
  path = tmp_path / "value.json"
  path.write_text("old")
  done = python("-c", FULL, path, check=True)
  lines = done.stdout.splitlines()
  assert len(lines) == 2 and all(f"cannot write {path}: File too large" in line for line in lines)
  assert path.read_text().startswith("old") and os.listdir(tmp_path) == ["value.json"]


BAD = {
  "empty": (b"", "Expecting value"),
  "garbage": (b"\x00\x01garbage", "Expecting value"),
  "a list": (b"[1]", "it holds a list, not an object"),
  "no UTF-8": (b'{"a": "\xff"}', "it is not UTF-8 text"),
  "cut": (b'{"a": 1', "Expecting ','"),
  "deep": (b'{"a":' + b"[" * 100_000, "recursion"),
  "long": (b'{"a": ' + b"9" * 10_000 + b"}", "Exceeds the limit"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_object_is_one_line(kind, tmp_path):
  path, (data, why) = tmp_path / "value.json", BAD[kind]
  path.write_bytes(data)
  with pytest.raises(DamagedError) as error:
    files.read_json(path, "delete it")
  assert why in str(error.value) and str(error.value).endswith("; delete it")
  assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(path))


def test_a_digest_tells_a_change_and_may_be_missing(tmp_path):
  path = tmp_path / "value.json"
  for values in ({"a": 1, "b": [float("inf")]}, {"about": {"a": 1}}):
    files.write_json(path, files.sealed(values))
    assert files.read_json(path, "") == files.sealed(values)
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(DamagedError, match=r"\(if you changed it, remove its digest\); put it"):
      files.read_json(path, "put it back")
  path.write_text('{"a": 2}')
  assert files.read_json(path, "") == {"a": 2}


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
  with pytest.raises(DamagedError, match=r"cannot be read \(Is a directory\); delete it"):
    files.read_json(tmp_path, "delete it")
  assert files.read_json(tmp_path / "missing.json", "") == {}


def test_a_pipe_or_a_device_in_the_place_of_a_file_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "zero").symlink_to("/dev/zero")
  for name in ("pipe", "zero"):
    for read in (lambda path: files.read_json(path, "delete it"), files.read_lines):
      with pytest.raises(DamagedError, match=rf"{name} cannot be read \(it is no file\); "):
        read(tmp_path / name)


def test_damaged_lines_are_counted_and_a_cut_last_one_is_not(tmp_path):
  path = tmp_path / "lines.jsonl"
  path.write_bytes(b'{"step": 1}\n[2]\n\xff\xfe\n{"step": 4}\n{"step": 5')
  assert files.read_lines(path) == ([{"step": 1}, {"step": 4}], [2, 3])
  files.append_line(tmp_path / "new.jsonl", {"step": 7})
  assert json.loads((tmp_path / "new.jsonl").read_text()) == {"step": 7}
