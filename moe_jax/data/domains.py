"""Makes three labelled kinds of text from Python's standard library: code, prose and bytecode.

A mixture of labelled texts shows whether experts tell the kinds apart. The texts depend only on the
sources and on the interpreter's version, and need no network. They are cut into pages that are
ordered by hash, so that a few rows already hold pages of many files of every domain.
"""

import ast
import dis
import functools
import inspect
import io
import itertools
import pathlib
import re
import tokenize
import types
import warnings
from collections.abc import Iterator

from moe_jax.data import text_files

DOMAINS = ("code", "prose", "bytecode")
VERSION = "1"  # of the code that makes the texts; part of their cache key
# The most characters of a file's text, chosen so that the domains have about the same size.
_LONGEST = {"code": 20_000, "prose": 40_000, "bytecode": 8_000}
_PAGE_LENGTH = 2_000  # the most characters of a page, which is one document
_TOPICS = "pydoc_data/topics.py"  # the language reference, in one dict


def sources() -> tuple[pathlib.Path, list[str]]:
  """Returns the standard library's folder and the names of its .py files to make texts from.

  Left out are tests, which some packagers do not ship, the tables of `encodings`, and the file
  `_sysconfigdata*`, which a build of Python writes.
  """
  root, names = text_files.stdlib()
  skipped = {"test", "tests", "idle_test", "encodings"}
  return root, [
    name
    for name in names
    if not skipped & set(name.split("/")[:-1]) and not name.startswith("_sysconfigdata")
  ]


@functools.cache  # making them takes longer than reading them three times
def documents(root: pathlib.Path, names: tuple[str, ...]) -> list[text_files.Document]:
  """Returns (domain/path:page, text) of the files of these names, 11 MB for all of them."""
  return [
    (f"{label}:{number}", page)
    for label, text in _texts(root, names)
    for number, page in enumerate(pages(text, _LONGEST[label.split("/")[0]]))
  ]


def split_of(name: str) -> str:
  """Returns the split of a document: all texts made from one file or topic are in the same."""
  return text_files.split_of(name.partition("/")[2].rpartition(":")[0])


def _texts(root: pathlib.Path, names: tuple[str, ...]) -> Iterator[text_files.Document]:
  for name, source in text_files.stdlib_documents(root, names):
    if name == _TOPICS:
      for topic, text in topics(source).items():
        yield f"prose/{name}:{topic}", text
      continue
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes, `is` with a literal
      try:
        # optimize=2 leaves the docstrings out.
        compiled = compile(source, name, "exec", dont_inherit=True, optimize=2)
        code, prose = separate(source)
      except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        continue  # not valid in this version of Python, such as the samples of lib2to3
    yield f"code/{name}", code
    yield f"prose/{name}", prose
    yield f"bytecode/{name}", listing(compiled, _LONGEST["bytecode"])


def pages(text: str, longest: int) -> Iterator[str]:
  """Cuts the first `longest` characters into pages at ends of lines; leaves out blank pages."""
  page = ""
  for line in text[:longest].splitlines(keepends=True):
    if page and len(page) + len(line) > _PAGE_LENGTH:
      if page.strip():
        yield page
      page = ""
    page += line
  if page.strip():
    yield page


def topics(source: str) -> dict[str, str]:
  """Returns the dict that the source of pydoc_data/topics.py assigns."""
  assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
  return ast.literal_eval(assigned[0].value) if assigned else {}


def separate(source: str) -> tuple[str, str]:
  """Returns the source without docstrings and comments, and the text of these in order.

  A string that is a statement by itself counts as a docstring.
  """
  lines = source.split("\n")
  tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
  prose: list[str] = []
  emptied = set()
  statement_begins, last_comment = True, -2
  for token, following in itertools.pairwise(tokens):
    row, column = token.start[0] - 1, token.start[1]
    if token.type == tokenize.COMMENT:
      lines[row] = lines[row][:column].rstrip()
      emptied.add(row)
      text = re.sub(r"^#+ ?", "", token.string)
      if last_comment == row - 1 and prose:
        prose[-1] += "\n" + text
      else:
        prose.append(text)
      last_comment = row
    elif token.type == tokenize.STRING and statement_begins:
      ends = following.type in (tokenize.NEWLINE, tokenize.COMMENT)
      value = ast.literal_eval(token.string) if ends else b""
      if isinstance(value, str):
        prose.append(inspect.cleandoc(value))
        for line in range(row, token.end[0]):
          lines[line] = ""
          emptied.add(line)
    if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
      statement_begins = token.type == tokenize.NEWLINE
  code = "\n".join(line for n, line in enumerate(lines) if line.strip() or n not in emptied)
  paragraphs = (text.strip("\n") for text in prose if any(map(str.isalpha, text)))
  return code.strip("\n") + "\n", "\n\n".join(paragraphs) + "\n"


def listing(code: types.CodeType, enough: int) -> str:
  """Returns the `dis` listing of a code object and the code objects inside it.

  Stops after `enough` characters. Addresses and the order of frozensets change from run to run, so
  constants of these types are written in another way. Long constants are cut, because their
  contents are prose or data.
  """
  lines, length = [], 0
  waiting = [code]
  while waiting and length < enough:
    function = waiting.pop(0)
    constants = [c for c in function.co_consts if isinstance(c, types.CodeType)]
    waiting = constants + waiting
    body = [f"{function.co_qualname}:"]
    for step in dis.get_instructions(function):
      constant = step.argval if step.opname.endswith("_CONST") else None
      argument = _constant(constant) if isinstance(constant, _UNSTABLE) else step.argrepr
      argument = argument or ("" if step.arg is None else str(step.arg))
      body.append(f"{step.offset:>6} {step.opname} {argument[:60]}".rstrip())
    lines += body
    length += sum(map(len, body)) + len(body)
  return "\n".join(lines) + "\n"


_UNSTABLE = (types.CodeType, frozenset, tuple)


def _constant(value: object) -> str:
  if isinstance(value, types.CodeType):
    return f"<code {value.co_name}>"
  if isinstance(value, frozenset):
    return "{" + ", ".join(sorted(map(_constant, value))) + "}"
  if isinstance(value, tuple):
    return "(" + ", ".join(map(_constant, value)) + ("," if len(value) == 1 else "") + ")"
  return repr(value)
