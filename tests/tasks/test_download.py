"""Checksummed downloads from a web server on loopback that makes trouble."""

import fcntl
import gzip
import hashlib
import http.server
import json
import threading

import pytest

from pluribus.core.errors import FormatError, MissingError, NetworkError, OutputError
from pluribus.core.remote import Patience
from pluribus.tasks import download, sets, sources, texts
from pluribus.tasks.sources import File, Origin

SOON = Patience(tries=4, first=0.001, longest=0.01, timeout=5)
CONTENT = bytes(range(256)) * 1000


class Server:
    """One file; `faults`, one a request: cut (half of the body), 503, 404, plain (no ranges)."""

    def __init__(self, content):
        self.content, self.faults, self.asked = content, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/set/data.bin"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, call):
        fault = self.faults.pop(0) if self.faults else ""
        asked = call.headers.get("Range")
        self.asked.append(asked)
        if fault.isdecimal():
            call.send_response(int(fault))
            call.send_header("Content-Length", "0")
            call.end_headers()
            return
        data, whole = self.content, len(self.content)
        if asked and fault != "plain":
            first, last = asked.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
            call.send_response(206)
            call.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
        else:
            call.send_response(200)
        call.send_header("Content-Length", str(len(data)))
        call.end_headers()
        call.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        call.close_connection = fault == "cut"


@pytest.fixture
def server(monkeypatch):
    for name in ("PLURIBUS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    made = Server(CONTENT)
    yield made
    made.server.shutdown()
    made.server.server_close()


def file(server, content=CONTENT, **changes):
    told = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return File(url=server.url, **(told | changes))


def fetch(server, path, **more):
    return download.fetch(file(server), path, patience=SOON, **more)


def test_a_file_arrives_whole_with_progress_and_is_not_fetched_twice(server, tmp_path):
    told = []
    path = fetch(server, tmp_path / "a" / "data.bin", on_bytes=lambda *now: told.append(now))
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("data.bin", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    fetch(server, path)
    assert server.asked == [None]
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "data.bin",
        "data.bin.partial.lock",
    ]


def test_trouble_passes_and_goes_on_from_the_last_byte(server, tmp_path):
    server.faults = ["cut", "503", "cut"]
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT
    half, more = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    last = len(CONTENT) - 1
    assert server.asked == [
        None,
        f"bytes={half}-{last}",
        f"bytes={half}-{last}",
        f"bytes={more}-{last}",
    ]


def test_an_interrupted_download_goes_on_in_the_next_call(server, tmp_path):
    path = tmp_path / "data.bin"

    def stop(_, done, __):
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, path, on_bytes=stop)
    assert not path.exists()
    begun = (tmp_path / "data.bin.partial").stat().st_size
    assert 100_000 < begun < len(CONTENT)
    assert fetch(server, path).read_bytes() == CONTENT
    assert server.asked[1] == f"bytes={begun}-{len(CONTENT) - 1}"
    assert not (tmp_path / "data.bin.partial").exists()


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    (tmp_path / "data.bin.partial").write_bytes(CONTENT[:5000])
    server.faults = ["plain"]
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT
    assert len(server.asked) == 1


@pytest.mark.parametrize("left", [b"something else", CONTENT[:-1] + b"?", CONTENT + b"more"])
def test_a_partial_file_of_something_else_is_begun_anew(server, tmp_path, left):
    (tmp_path / "data.bin.partial").write_bytes(left)
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    wrong = file(server, sha256="0" * 64)
    with pytest.raises(FormatError, match=r"SHA-256 .* expected 0{64} .*PLURIBUS_DATA"):
        download.fetch(wrong, tmp_path / "data.bin", patience=SOON)
    assert not list(tmp_path.glob("data.bin*[!k]"))
    assert len(server.asked) == 1


def test_another_length_is_refused_before_the_body(server, tmp_path):
    other = file(server, bytes=len(CONTENT) - 7)
    with pytest.raises(FormatError, match="256000 bytes at the source, expected 255993"):
        download.fetch(other, tmp_path / "data.bin", patience=SOON)


def test_gives_up_on_a_file_that_is_not_there_or_never_whole(server, tmp_path):
    server.faults = ["404"]
    with pytest.raises(MissingError, match="not there"):
        fetch(server, tmp_path / "data.bin")
    server.faults = ["503"] * 9
    with pytest.raises(NetworkError, match="after 4 tries"):
        fetch(server, tmp_path / "data.bin")
    assert not (tmp_path / "data.bin").exists()


@pytest.mark.parametrize("name", ["PLURIBUS_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_nobody(server, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(MissingError, match=f"{name} is set .*data.bin.*unset it"):
        fetch(server, tmp_path / "data.bin")
    assert server.asked == []
    (tmp_path / "data.bin").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_kept_file_that_changed_is_an_error_once(server, tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(FormatError, match="removed"):
        fetch(server, path)
    assert fetch(server, path).read_bytes() == CONTENT


def test_two_processes_do_not_mix_their_bytes(server, tmp_path):
    with (tmp_path / "data.bin.partial.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is downloading it"):
            fetch(server, tmp_path / "data.bin")
    assert fetch(server, tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_says_so(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        fetch(server, tmp_path / "file" / "data.bin")


# -- sets ------------------------------------------------------------------------------------------

LINES = b"0 dull and long\n1 a fine film\n\n1 funny\n"
ROWS = [
    {"text": "dull and long", "label": "negative", "split": "train"},
    {"text": "a fine film", "label": "positive", "split": "train"},
    {"text": "funny", "label": "positive", "split": "train"},
    {"text": "dull and long", "label": "negative", "split": "dev"},
    {"text": "a fine film", "label": "positive", "split": "dev"},
    {"text": "funny", "label": "positive", "split": "dev"},
    {"text": "dull and long", "label": "negative", "split": "test"},
    {"text": "a fine film", "label": "positive", "split": "test"},
    {"text": "funny", "label": "positive", "split": "test"},
]


@pytest.fixture
def origin(server, monkeypatch, tmp_path):
    """The set sst2 with its own conversion, but from the server here."""
    server.content = LINES
    made = Origin(
        files=(file(server, LINES),) * 3,
        licence="none",
        rows=sources.ORIGINS["sst2"].rows,
        digest=texts.digest(ROWS),
    )
    monkeypatch.setitem(sources.ORIGINS, "sst2", made)
    monkeypatch.setenv("PLURIBUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PLURIBUS_DATA", raising=False)
    return made


def test_a_set_that_is_nowhere_comes_from_its_public_source(server, origin, tmp_path):
    assert sets.locate("sst2", sets.TEXTS) == sets.Located("public source", None)
    assert sets.records("sst2") == ROWS
    kept = tmp_path / "cache" / "data" / "text" / "sst2.jsonl.gz"
    assert [json.loads(line) for line in gzip.decompress(kept.read_bytes()).splitlines()] == ROWS
    assert sets.locate("sst2", sets.TEXTS) == sets.Located("cache", kept)
    found = sets.texts("sst2")
    assert len(server.asked) == 3
    assert found.classes == ("negative", "positive")
    assert found.test[1] == texts.TextRow("a fine film", None, 1)
    assert not (tmp_path / "cache" / "data" / "downloads" / "sst2").exists()


def test_the_users_folder_comes_before_the_cache_and_the_cache_before_the_source(
    server, origin, tmp_path, monkeypatch
):
    texts.write(tmp_path / "cache" / "data" / "text" / "sst2.jsonl.gz", ROWS[3:])
    assert sets.records("sst2") == ROWS[3:]
    monkeypatch.setenv("PLURIBUS_DATA", str(tmp_path / "own"))
    texts.write(tmp_path / "own" / "sst2.jsonl.gz", ROWS[:1])
    assert sets.records("sst2") == ROWS[:1]
    texts.write(tmp_path / "own" / "text" / "sst2.jsonl.gz", ROWS[:2])
    assert sets.records("sst2") == ROWS[:2]
    assert server.asked == []


def test_offline_says_where_to_put_the_set(server, origin, monkeypatch):
    monkeypatch.setenv("PLURIBUS_OFFLINE", "1")
    with pytest.raises(sets.DataError) as caught:
        sets.texts("sst2")
    assert "looked for text/sst2.jsonl.gz" in str(caught.value)
    assert "Or unset PLURIBUS_OFFLINE, to have it downloaded" in str(caught.value)
    assert server.asked == []


def test_rows_that_are_not_the_known_ones_are_refused(origin, tmp_path):
    odd = Origin(files=origin.files, licence="none", rows=origin.rows, digest="f" * 64)
    with pytest.raises(FormatError, match="fault of the conversion"):
        download.text_set("sst2", tmp_path, origin=odd, patience=SOON)
    assert not (tmp_path / "text").exists()


def test_sets_without_a_known_source_are_not_guessed(tmp_path):
    with pytest.raises(MissingError, match="no public source with a known checksum for 'mnist'"):
        download.text_set("mnist", tmp_path)
