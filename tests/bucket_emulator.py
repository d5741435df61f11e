"""A bucket on this machine: gcp-storage-emulator, with the generations of objects that tensorstore reads and it does not send."""

import contextlib
import dataclasses
import io
import json
import logging
import re
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound


@dataclasses.dataclass
class Traffic:
    """What was asked of the bucket since it was last reset.

    Attributes:
      requests: all of them. contents: those for what is in an object. read: bytes that were sent for any.
      written: bytes that came with requests. read_only: whether writing is refused, as without the permission to.
    """

    requests: int = 0
    contents: int = 0
    read: int = 0
    written: int = 0
    read_only: bool = False

    def reset(self):
        self.requests = self.contents = self.read = self.written = 0


TRAFFIC = Traffic()


class _Counted:
    """A stream of answers that counts the bytes behind their headers."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, content):
        if not content.startswith(b"HTTP/"):
            TRAFFIC.read += len(content)
        return self._stream.write(content)

    def __getattr__(self, name):
        return getattr(self._stream, name)


class _Handler(server.RequestHandler):
    """Answers every request for an object with its generation, and refuses those on condition of another (0: of none)."""

    def _asked(self):
        """(generation of the object that is asked for, or None where none is; the query)."""
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        found = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)/o(?:/(.*))?", url.path)
        name = found and (unquote(found[2] or "") or query.get("name"))
        if found and not name and query.get("uploadType") == "multipart":  # its name is in the first of its parts
            name = json.loads(self._body.split(b"\n\n")[1].split(b"\n--")[0])["name"]
        if not name:
            return None, query
        try:
            return self.storage.get_file_obj(found[1], name)["generation"], query
        except (NotFound, KeyError):
            return "0", query

    def setup(self):
        super().setup()
        self.wfile = _Counted(self.wfile)

    def _answer(self):
        TRAFFIC.requests += 1
        TRAFFIC.contents += self.command == "GET" and "alt=media" in self.path
        stream = self.rfile
        self._body = stream.read(int(self.headers.get("Content-Length") or 0))
        TRAFFIC.written += len(self._body)
        self.rfile = io.BytesIO(self._body)
        try:
            self._answer_body()
        finally:
            self.rfile = stream

    def _answer_body(self):
        generation, query = self._asked()
        refused = 403 if TRAFFIC.read_only and self.command in ("POST", "PUT") else None
        if generation is not None and query.get("ifGenerationMatch", generation) != generation:
            refused = 412
        elif generation is not None and query.get("ifGenerationNotMatch") == generation:
            refused = 304
        if refused is None:
            server.Router(self).handle(self.command)
            return
        self.send_response(refused)
        self.send_header("Content-Length", "0")
        super().end_headers()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def end_headers(self):
        generation, _ = self._asked()
        if generation not in (None, "0"):
            self.send_header("x-goog-generation", generation)
        super().end_headers()


@contextlib.contextmanager
def running(mirror):
    """The emulator with an empty gs://bucket, and all that reads buckets pointed at it. mirror: for copies of what is in it."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "RequestHandler", _Handler)
        patch.setattr(
            server.server.HTTPServer, "handle_error", lambda self, request, address: None
        )  # readers that hang up
        emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        with emulator:
            while emulator._api._httpd is None:
                pass
            url = f"http://127.0.0.1:{emulator._api._httpd.server_port}"
            patch.setenv("STORAGE_EMULATOR_HOST", url)  # gcsfs
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # tensorstore would look for credentials first
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # nor gcsfs ask what kind of bucket it is
            patch.setattr("flowlm.system.storage.MIRROR", str(mirror))
            yield
