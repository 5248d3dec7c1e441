"""Google Cloud Storage on this machine: a process that answers as its JSON API does.

A bucket is a folder, an object a file in it, its generation the time of its last change. So a test
can end the process and start it again, and read what a run left there as files. gcsfs, Google's
client and tensorstore's all talk to it when they get the environment of `Store`.
"""

import contextlib
import http.server
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

_ONE_AT_A_TIME = threading.Lock()  # the real one is consistent, too
_UPLOADS: dict[
  str, tuple[str, str, bytes]
] = {}  # {id: bucket, name and bytes of an upload in parts}


class Store:
  """The process, its folder, and the environment in which the clients find it."""

  def __init__(self, folder: pathlib.Path, bucket: str = "bucket"):
    """Starts the process with an empty bucket, or with what `folder` has of an earlier one."""
    self.folder = folder / bucket  # of the bucket's objects
    self.requests = folder / "requests.log"  # a line for each object that was written
    self.refused = folder / "refused.txt"  # objects with this text in their names are refused
    self.held = folder / "held.txt"  # objects with this text in their names wait to be written
    self.folder.mkdir(parents=True, exist_ok=True)
    self._port = free_port()
    self.url = f"http://127.0.0.1:{self._port}"
    self.env = {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks another service for the bucket's kind
    }
    self.start()

  def start(self) -> None:
    arguments = [str(self.folder.parent), str(self._port)]
    self._process = subprocess.Popen([sys.executable, __file__, *arguments], stdin=subprocess.PIPE)
    for _ in range(1000):
      with contextlib.suppress(OSError):
        urllib.request.urlopen(self.url + "/storage/v1/b/" + self.folder.name).close()
        return
      time.sleep(0.1)
    raise TimeoutError(self.url)

  def stop(self) -> None:
    """Ends the process at once, as an outage does; the clients' connections are refused."""
    self._process.kill()
    self._process.communicate()

  def writes(self, name: str) -> int:
    """Returns how often an object was written."""
    lines = self.requests.read_text().splitlines()
    return sum(line.startswith("wrote ") and line.endswith("/" + name) for line in lines)


def free_port() -> int:
  """Returns a port that the system gives to no client, which could take it in an outage."""
  while True:
    port = random.randrange(20000, 30000)
    with socket.socket() as server, contextlib.suppress(OSError):
      server.bind(("127.0.0.1", port))
      return port


class Refused(Exception):
  """The number is the status of the answer."""


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers one request. The first part of a request's path says which API it is of."""

  protocol_version = "HTTP/1.1"
  wbufsize = -1  # headers and content in one packet
  root = pathlib.Path()

  def answer(self) -> None:
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    with _ONE_AT_A_TIME:
      try:
        status, content, headers = self.result(self.command, self.path, body)
      except Refused as refused:
        status, content, headers = refused.args[0], b'{"error": {"message": "refused"}}', {}
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(content))} | headers).items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(content)

  do_GET = do_POST = do_PUT = do_DELETE = answer

  def log_message(self, *_) -> None:
    pass

  def result(self, method: str, url: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Returns status, content and headers."""
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query))
    if parts.path == "/batch/storage/v1":
      return self.batch(body)
    found = re.fullmatch(
      r"(?:/(upload|download))?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", parts.path
    )
    if not found:
      raise Refused(501)
    api, bucket, rest = found.groups()
    if bucket == "closed":  # to everyone
      raise Refused(403)
    if not (self.root / bucket).is_dir():
      raise Refused(404)
    if api == "upload":
      return self.upload(bucket, query, body)
    if rest is None:
      listing = parts.path.endswith("/o")
      return as_json(self.listing(bucket, query) if listing else {"name": bucket, "id": bucket})
    name, *target = rest.split("/")
    name = urllib.parse.unquote(name)
    path = self.root / bucket / name
    refused = self.root / "refused.txt"
    if refused.exists() and refused.read_text() in name:
      raise Refused(403)
    if not path.is_file():
      raise Refused(404)
    check_conditions(path, query)
    if target:  # copies of one object: rewriteTo/b/BUCKET/o/NAME, moveTo/o/NAME
      copy = self.write(bucket, urllib.parse.unquote(target[-1]), path.read_bytes(), {})
      if target[0] == "moveTo":
        path.unlink()
      return as_json({"done": True, "resource": copy} if target[0] == "rewriteTo" else copy)
    if method == "DELETE":
      path.unlink()
      return 204, b"", {}
    if api == "download" or query.get("alt") == "media":
      return self.content(path)
    return as_json(self.about(path))

  def content(self, path: pathlib.Path) -> tuple[int, bytes, dict[str, str]]:
    data = path.read_bytes()
    headers = {"x-goog-generation": str(path.stat().st_mtime_ns)}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if not asked:
      return 200, data, headers
    start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
    if start >= len(data):
      raise Refused(416)
    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return 206, data[start : end + 1], headers

  def listing(self, bucket: str, query: dict[str, str]) -> dict:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    paths = [path for path in (self.root / bucket).rglob("*") if path.is_file()]
    items, prefixes = [], set()
    for name, path in sorted(
      (path.relative_to(self.root / bucket).as_posix(), path) for path in paths
    ):
      inside = query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff")
      if name.startswith(prefix) and inside:
        below = name[len(prefix) :].partition(delimiter)[1:] if delimiter else ("", "")
        if below[0]:
          prefixes.add(name[: len(name) - len(below[1])])
        else:
          items.append(self.about(path))
    # Pages of 100: the next page's token is the number of its first item.
    first = int(query.get("pageToken", 0))
    more = {"nextPageToken": str(first + 100)} if len(items) > first + 100 else {}
    return {
      "kind": "storage#objects",
      "items": items[first : first + 100],
      "prefixes": sorted(prefixes),
      **more,
    }

  def about(self, path: pathlib.Path) -> dict[str, str]:
    bucket, name = path.relative_to(self.root).as_posix().split("/", 1)
    stat = path.stat()
    changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
    return {
      "kind": "storage#object",
      "bucket": bucket,
      "name": name,
      "size": str(stat.st_size),
      "generation": str(stat.st_mtime_ns),
      "metageneration": "1",
      "updated": changed,
      "timeCreated": changed,
      "storageClass": "STANDARD",
    }

  def upload(
    self, bucket: str, query: dict[str, str], body: bytes
  ) -> tuple[int, bytes, dict[str, str]]:
    """Takes an object in one request, in two parts of one, or in several requests."""
    if upload := query.get("upload_id"):
      _, name, before = _UPLOADS[upload]
      asked = self.headers["Content-Range"]  # bytes 0-99/* or bytes 100-149/150
      _UPLOADS[upload] = bucket, name, before + body
      if asked.endswith("*"):
        return 308, b"", {"Range": f"bytes=0-{len(before + body) - 1}"}
      return as_json(self.write(bucket, name, _UPLOADS.pop(upload)[2], query))
    if query["uploadType"] == "media":
      return as_json(self.write(bucket, query["name"], body, query))
    if query["uploadType"] == "multipart":
      about, data = parts_of(self.headers["Content-Type"], body)
      return as_json(self.write(bucket, json.loads(about)["name"], data, query))
    name = query.get("name") or json.loads(body)["name"]
    upload = str(time.monotonic_ns())
    _UPLOADS[upload] = bucket, name, b""
    return 200, b"", {"Location": f"http://{self.headers['Host']}{self.path}&upload_id={upload}"}

  def write(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> dict[str, str]:
    path, held = self.root / bucket / name, self.root / "held.txt"
    while held.exists() and held.read_text() in name:
      time.sleep(0.02)
    check_conditions(path, query)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = self.root / "new"
    new.write_bytes(data)
    new.replace(path)
    with (self.root / "requests.log").open("a") as log:
      log.write(f"wrote {bucket}/{name}\n")
    return self.about(path)

  def batch(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Does the requests that are the parts of one."""
    answers = []
    for part in parts_of(self.headers["Content-Type"], body):
      method, url, _ = part.decode().split(" ", 2)
      try:
        status, content, _ = self.result(
          method, urllib.parse.urlsplit(url)._replace(scheme="", netloc="").geturl(), b""
        )
      except Refused as refused:
        status, content = refused.args[0], b""
      answers.append(
        b"--part\r\nContent-Type: application/http\r\n\r\n"
        b"HTTP/1.1 %d Done\r\n\r\n%s\r\n" % (status, content)
      )
    return 200, b"".join(answers) + b"--part--", {"Content-Type": "multipart/mixed; boundary=part"}


class Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request, client_address) -> None:
    if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
      super().handle_error(request, client_address)


def as_json(values: dict) -> tuple[int, bytes, dict[str, str]]:
  return 200, json.dumps(values).encode(), {"Content-Type": "application/json"}


def check_conditions(path: pathlib.Path, query: dict[str, str]) -> None:
  """An object's generation is 0 where there is none."""
  generation = str(path.stat().st_mtime_ns) if path.is_file() else "0"
  if query.get("ifGenerationMatch", generation) != generation:
    raise Refused(412)
  if query.get("ifGenerationNotMatch") == generation:
    raise Refused(304)


def parts_of(content_type: str, body: bytes) -> list[bytes]:
  """Returns the contents of the parts of a multipart/mixed or multipart/related body.

  Not by the email package, which takes a carriage return at the end of an object for a line's end.
  """
  line_end = b"\r\n" if body.partition(b"\n")[0].endswith(b"\r") else b"\n"
  boundary = re.search("boundary=[\"']?([^\"';]+)", content_type)[1].encode()
  parts = (line_end + body).split(line_end + b"--" + boundary)[1:-1]
  return [part.split(line_end * 2, 1)[1] for part in parts]


def end_with_parent() -> None:
  sys.stdin.read()  # until the tests end, however they end
  os._exit(0)


if __name__ == "__main__":
  threading.Thread(target=end_with_parent, daemon=True).start()
  Handler.root = pathlib.Path(sys.argv[1])
  Server(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
