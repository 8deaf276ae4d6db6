"""safetensors over HTTP: headers first, then only the ranges that are asked for.

Every request is repeated after dropped connections, short answers, 429 and 5xx, going on from the
byte that arrived last, with waits that double up to a limit or are as long as the server says.
Tensors are read through a small cache of chunks. If the file changes at the server meanwhile (ETag,
date or size), reading stops with an error.
"""

import http.client
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit, urlunsplit

import numpy as np

from pluribus.core.errors import FormatError, MissingError, NetworkError
from pluribus.core.formats import Opened
from pluribus.core.formats.safetensors import header_length, opened
from pluribus.core.recent import Recent
from pluribus.core.source import Source, TensorSpec
from pluribus.core.weights import INDEXES, SINGLES, Weights, join_shards, parse_index

CHUNK = 4 << 20  # bytes of one range request for tensor data
PIECE = 1 << 16  # bytes that are read of an answer at once
HEAD = 1 << 17  # bytes of the first request: most headers fit
MAX_SIDECAR = 1 << 28
SIDECARS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
)
_chunks = Recent(8 * CHUNK)


class Patience(NamedTuple):
    """How long a request is tried: number of tries, seconds of the first and longest wait."""

    tries: int = 6
    first: float = 0.5
    longest: float = 30.0
    timeout: float = 30.0  # seconds without a byte

    def wait(self, failures: int, asked: str | None) -> float:
        """Return the seconds to wait after so many failures; `asked` is a Retry-After header."""
        wait = self.first * 2.0 ** (failures - 1)
        if asked and asked.strip().isdecimal():
            wait = float(asked)
        return min(wait, self.longest)


class _Again(Exception):
    """A failure that may pass; `after` is what Retry-After said."""

    def __init__(self, why: str, after: str | None = None) -> None:
        super().__init__(why)
        self.after = after


class _NoAddress(_Again):
    """A host whose name nobody knows; there may be no network at all."""


class _Refused(NetworkError):
    """401 or 403, which some servers answer for files that are not there."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but gives the token to no other host and never without encryption."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        """See `urllib.request.HTTPRedirectHandler`."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if new is not None and token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            new.add_unredirected_header("Authorization", token)
        return new


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Return what opens http(s) addresses; loopback ones never through the environment's proxy."""
    host = urlsplit(url).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({} if local else None),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        director.add_handler(handler)
    return director


_MET: set[str] = set()  # hosts that have answered: what is lost with them may come back


class Remote:
    """One file at an address. Picklable; requests may come from any thread."""

    def __init__(
        self, url: str, *, token: str | None = None, patience: Patience | None = None
    ) -> None:
        self.url, self.token, self.patience = url, token, patience or Patience()
        self.size = -1  # bytes, known after the first answer
        self.version = ""  # ETag, or date, of the first answer

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    def range(self, begin: int, end: int) -> bytes:
        """Return bytes [begin, end), or fewer if the file ends before.

        Raises NetworkError naming address, offset and tries; MissingError if it is not there.
        """
        held = bytearray()

        def once() -> None:
            at = begin + len(held)
            with self._ask({"Range": f"bytes={at}-{end - 1}"}) as answer:
                self._check(answer, at)
                stop = min(end, self.size)
                while len(held) < stop - begin:
                    piece = answer.read(min(PIECE, stop - begin - len(held)))
                    if not piece:
                        raise _Again(f"the answer stopped at byte {begin + len(held)}")
                    held.extend(piece)

        self._patiently(once, lambda: begin + len(held))
        return bytes(held)

    def whole(self, known: str | None = None, most: int = MAX_SIDECAR) -> tuple[bytes, str] | None:
        """Return a small file and its ETag, or None if the ETag is still `known`.

        Raises MissingError if it is not there, NetworkError.
        """
        got: list[tuple[bytes, str] | None] = []

        def once() -> None:
            with self._ask({"If-None-Match": known} if known else {}) as answer:
                if answer.status == 304:
                    got.append(None)
                    return
                length = answer.headers.get("Content-Length")
                data = answer.read(most + 1)
                if len(data) > most:
                    raise NetworkError(f"{self.url}: more than {most} bytes")
                if length and length.isdecimal() and len(data) < int(length):
                    raise _Again(f"{len(data)} of {length} bytes arrived")
                got.append((data, answer.headers.get("ETag", "")))

        self._patiently(once, lambda: 0)
        return got[0]

    def stream(self, length: int, put: Callable[[int, bytes], None], begin: int = 0) -> None:
        """Hand over a file of a known length as it arrives, from byte `begin` on.

        `put(at, piece)` takes the bytes that stand at `at`. They come in order; only a server that
        serves no ranges makes them begin again, at 0. What `put` raises goes through untouched.

        Raises FormatError, before the first byte, if the file has another length; MissingError if
        it is not there, NetworkError as `range` does.
        """
        at = begin
        fault: list[OSError] = []  # of `put`: asking the server again would not help

        def once() -> None:
            nonlocal at
            if at == length:
                return
            with self._ask({"Range": f"bytes={at}-{length - 1}"} if at else {}) as answer:
                if answer.status == 206:
                    self._check(answer, at)
                else:  # the whole file, whatever was asked for
                    at = 0
                told = answer.headers.get("Content-Length", "")
                if told.isdecimal() and at + int(told) != length:
                    raise FormatError(
                        f"{self.url}: {at + int(told)} bytes at the source, expected {length}; it "
                        "is not the file that was looked for"
                    )
                while at < length:
                    piece = answer.read(min(PIECE, length - at))
                    if not piece:
                        raise _Again(f"the answer stopped at byte {at}")
                    try:
                        put(at, piece)
                    except OSError as error:
                        fault.append(error)
                        return
                    at += len(piece)

        self._patiently(once, lambda: at)
        if fault:
            raise fault[0]

    def _patiently(self, once: Callable[[], None], at: Callable[[], int]) -> None:
        failures = 0
        while True:
            try:
                return once()
            except (_Again, http.client.HTTPException, OSError) as error:
                if isinstance(error, NetworkError | MissingError):
                    raise
                failures += 1
                strange = isinstance(error, _NoAddress) and urlsplit(self.url).netloc not in _MET
                if failures >= (min(self.patience.tries, 2) if strange else self.patience.tries):
                    why = getattr(error, "reason", None) or error
                    raise NetworkError(
                        f"{self.url}: gave up at byte {at()} after {failures} tries "
                        f"({why or type(error).__name__}); check the connection and try again, or "
                        "download the file and give its path"
                    ) from None
                time.sleep(self.patience.wait(failures, getattr(error, "after", None)))

    def _ask(self, headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(self.url, headers=dict(headers))
        request.add_header("User-Agent", "pluribus")
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        try:
            answer = _opener(self.url).open(request, timeout=self.patience.timeout)
            _MET.add(urlsplit(self.url).netloc)
            return answer
        except urllib.error.HTTPError as answer:
            with answer:
                return self._refused(answer)
        except (http.client.InvalidURL, ValueError) as error:
            raise NetworkError(f"{self.url}: not a usable address ({error})") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, socket.gaierror):
                host = urlsplit(self.url).hostname
                raise _NoAddress(f"no address for {host}: is there a network?") from None
            raise

    def _refused(self, answer: urllib.error.HTTPError) -> Any:
        code = answer.code
        if code == 304:
            return _NotModified()
        if code in (408, 425, 429) or code >= 500:
            raise _Again(f"HTTP {code} {answer.reason}", answer.headers.get("Retry-After"))
        if code in (404, 410):
            raise MissingError(f"{self.url}: not there (HTTP {code})")
        if code in (401, 403):
            hint = "the token (HF_TOKEN) was refused" if self.token else "it may need HF_TOKEN"
            raise _Refused(f"{self.url}: HTTP {code} {answer.reason}; {hint}")
        if code == 416:
            raise FormatError(f"{self.url}: shorter than it was, or empty (HTTP 416)")
        raise NetworkError(f"{self.url}: HTTP {code} {answer.reason}")

    def _check(self, answer: Any, at: int) -> None:
        """Check that an answer is the range asked for, of the same file as before."""
        if answer.status != 206:
            raise NetworkError(
                f"{self.url}: the server does not serve ranges (HTTP {answer.status}); download "
                "the file and give its path"
            )
        told = answer.headers.get("Content-Range", "")
        unit, _, rest = told.partition(" ")
        span, _, total = rest.partition("/")
        first = span.partition("-")[0]
        if unit != "bytes" or not first.isdecimal() or not total.isdecimal() or int(first) != at:
            raise NetworkError(f"{self.url}: Content-Range {told!r} in answer to bytes {at}-")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        if self.size < 0:
            self.size, self.version = int(total), version
        elif (self.size, self.version) != (int(total), version):
            raise NetworkError(
                f"{self.url}: changed at the server while it was read (now {total} bytes, "
                f"{version or 'no ETag'}; before {self.size}, {self.version or 'no ETag'}); start "
                "again"
            )


class _NotModified:
    """The answer 304, which urllib takes for an error."""

    status = 304

    def __enter__(self) -> "_NotModified":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class HttpSource(Source):
    """A tensor's bytes in a remote file."""

    def __init__(self, remote: Remote, offset: int, spec: TensorSpec) -> None:
        self.remote, self.offset, self.spec = remote, offset, spec

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """See `Source.read`. Whole chunks are fetched and a few of them kept."""
        size = self.spec.kind.size
        begin, end = self.offset + start * size, self.offset + stop * size
        remote = self.remote
        while begin < end:
            number = begin // CHUNK
            low = number * CHUNK
            (chunk,) = _chunks.get(
                (remote.url, remote.version, remote.size, number),
                lambda low=low: (np.frombuffer(remote.range(low, low + CHUNK), np.uint8),),
            )
            upto = min(end, low + CHUNK)
            out[: upto - begin] = chunk[begin - low : upto - low]
            out, begin = out[upto - begin :], upto

    @property
    def identity(self) -> Any:
        """Address, version and place."""
        return (self.remote.url, self.remote.version, self.offset, self.spec)

    @property
    def fingerprint(self) -> str:
        """Address, size and ETag of the file, and the offset in it."""
        return f"{self.remote.url}:{self.remote.size}:{self.remote.version}:{self.offset}"


def open_file(remote: Remote) -> Opened:
    """Open one remote safetensors file from its header."""
    head = remote.range(0, HEAD)
    length = header_length(head[:8], remote.size, remote.url)
    if len(head) < 8 + length:
        head += remote.range(len(head), 8 + length)
    return opened(
        head[8 : 8 + length],
        remote.size,
        remote.url,
        lambda at, spec: HttpSource(remote, at, spec),
    )


def open_url(
    url: str,
    *,
    token: str | None = None,
    patience: Patience | None = None,
    label: str | None = None,
) -> Weights:
    """Open a .safetensors address, or a folder's with model.safetensors or its index.

    A folder's configuration and tokenizer are copied into the cache ($PLURIBUS_CACHE or
    ~/.cache/pluribus) and make up the weights' `folder`. Raises MissingError, NetworkError, or
    FormatError for what is no safetensors file.
    """
    path = urlsplit(url).path

    def at(name: str = "") -> Remote:
        return Remote(_below(url, name) if name else url, token=token, patience=patience)

    if path.endswith(".safetensors"):
        found = open_file(at())
        return Weights(
            found.sources, label=label or url, aliases=found.aliases, metadata=found.metadata
        )
    if path.endswith((".bin", ".pt", ".pth", ".gguf")):
        raise FormatError(f"{url}: only safetensors are read remotely; download it, give its path")
    try:
        index = at(INDEXES[0]).whole()
        assert index is not None
        shards = parse_index(index[0], _below(url, INDEXES[0]))
    except (MissingError, _Refused):
        shards = {SINGLES[0]: []}
    try:
        sources, aliases, metadata = join_shards(shards, lambda name: open_file(at(name)), url)
    except MissingError as error:
        raise MissingError(
            f"{error}; looked for {INDEXES[0]} and {SINGLES[0]} under {url}"
        ) from None
    return Weights(
        sources,
        label=label or url,
        aliases=aliases,
        folder=sidecars(url, at),
        metadata=metadata,
    )


def _below(url: str, name: str) -> str:
    parts = urlsplit(url)
    folder = urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/", query="", fragment=""))
    joined = urlsplit(urljoin(folder, name))
    return urlunsplit(joined._replace(query=parts.query))


def cache_folder() -> Path:
    """Return where small remote files are kept: $PLURIBUS_CACHE, else ~/.cache/pluribus."""
    return Path(os.path.expanduser(os.environ.get("PLURIBUS_CACHE") or "~/.cache/pluribus"))


def sidecars(url: str, at: Callable[[str], Remote]) -> Path:
    """Copy a remote folder's small files into the cache; return the local folder.

    Those that are there already are asked for by their ETag and not sent again.
    """
    import xxhash

    folder = cache_folder() / "http" / xxhash.xxh3_128_hexdigest(url.encode())
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / ".etags"
    try:
        tags = json.loads(record.read_text("utf-8"))
        tags = tags if isinstance(tags, dict) else {}
    except (OSError, ValueError):
        tags = {}
    kept: dict[str, str] = {}
    for name in SIDECARS:
        here = folder / name
        known = tags.get(name) if here.is_file() else None
        try:
            answer = at(name).whole(known if isinstance(known, str) else None)
        except (MissingError, _Refused):
            here.unlink(missing_ok=True)
            continue
        if answer is not None:
            _replace(here, answer[0])
        kept[name] = answer[1] if answer is not None else str(known)
    _replace(record, json.dumps(kept).encode())
    return folder


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
