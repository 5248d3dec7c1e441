"""A process that renders chat templates, which are foreign programs; it needs Jinja alone.

It reads a JSON object a line, and answers each with one: {"text": ...} or {"error": ...}. Jinja's
sandbox keeps a template from everything but the messages; the memory of the process is bounded, and
who started it ends it where an answer takes too long.
"""

import datetime
import json
import resource
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox

MEMORY = 2**30  # bytes


class Generation(ext.Extension):
  """{% generation %} ... {% endgeneration %} marks an answer, for training."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: parser.Parser) -> nodes.Node:
    """Returns what stands between the marks."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body, lineno=line)


def render(template: str, variables: dict[str, Any]) -> str:
  """Returns the text of a template, in the environment that transformers gives it."""

  def raise_exception(why: str) -> None:
    raise jinja2.TemplateError(why)

  def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
  ) -> str:
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  def strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
  )
  environment.filters["tojson"] = tojson
  environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
  return environment.from_string(template).render(variables)


def main() -> None:
  """Answers until its input ends."""
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  for line in sys.stdin:
    try:
      answer = {"text": render(**json.loads(line))}
    except Exception as error:  # whatever a foreign program raises
      kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__} "
      answer = {"error": (kind + " ".join(str(error).split()))[:300]}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
