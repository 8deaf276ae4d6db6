"""Who is let in: hosts, origins, tokens and keys."""

import http.client
import re
import socket

import httpx
import pytest
from ui_help import site, token

from pluribus.core.errors import InputError
from pluribus.ui.guard import COOKIE, Guard
from pluribus.ui.run import check_open

KEY = "a-long-secret"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with site(tmp_path_factory.mktemp("open")) as found:
        yield found


@pytest.fixture
def locked(tmp_path):
    with site(tmp_path, keys=(KEY,)) as found:
        yield found


@pytest.mark.parametrize(
    ("header", "fits"),
    [
        ("127.0.0.1:8765", True),
        ("localhost:8765", True),
        ("LOCALHOST:8765", True),
        ("[::1]:8765", True),
        ("127.0.0.1", True),
        ("127.0.0.1:80", False),
        ("evil.example:8765", False),
        ("127.0.0.1.evil.example:8765", False),
        ("192.0.2.7:8765", False),
        ("", False),
    ],
)
def test_hosts_on_loopback(header, fits):
    assert Guard("127.0.0.1", 8765).expects(header) == fits


def test_hosts_elsewhere():
    guard = Guard("0.0.0.0", 8765, (KEY,))
    assert guard.expects("192.0.2.7:8765")
    assert not guard.expects("evil.example:8765")
    assert Guard("box.example", 8765, (KEY,)).expects("box.example:8765")


def test_another_name_for_this_address_is_refused(client):
    answer = client.get("/", headers={"host": "evil.example"})
    assert answer.status_code == 421
    assert "card" not in answer.text


def test_requests_without_a_host(client):
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 421 " in raw.makefile("rb").readline()


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_forms_of_other_pages_are_refused(client, headers):
    data = {"token": token(client), "form": "demo"}
    answer = client.post("/runs", data=data, headers=headers)
    assert answer.status_code == 403
    assert (
        "No runs" in client.get("/runs").text or "Nothing has been run" in client.get("/runs").text
    )


@pytest.mark.parametrize("given", ["", "0" * 64, "ö"])
def test_forms_without_their_token_are_refused(client, given):
    for path in ("/runs", "/runs/1/cancel", "/runs/1/remove"):
        answer = client.post(path, data={"token": given, "form": "demo"})
        assert answer.status_code == 403
    assert "Nothing has been run" in client.get("/runs").text


def test_forms_that_are_none(client):
    assert client.post("/runs", json={"form": "demo"}).status_code == 415
    large = {"token": token(client), "form": "x" * 70_000}
    assert client.post("/runs", data=large).status_code == 413
    raw = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/runs", content=b"\xff\xfe=1", headers=raw).status_code in (400, 403)
    assert client.request("DELETE", "/runs/1").status_code == 405


def test_headers_of_every_answer(client):
    for path in ("/", "/nope", "/static/ui.js"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert "server" not in headers


# -- keys ------------------------------------------------------------------------------------------


def test_an_open_address_needs_a_key():
    check_open("127.0.0.1", ())
    check_open("0.0.0.0", (KEY,))
    with pytest.raises(InputError, match="--key-env"):
        check_open("0.0.0.0", ())


def test_nothing_is_shown_without_the_key(locked):
    for path in ("/", "/cards", "/runs", "/runs/1/state", "/reports/1", "/card/ties"):
        answer = locked.get(path)
        assert answer.status_code == 401, path
        assert "Merge what agrees" not in answer.text
    page = locked.get("/runs", headers={"accept": "text/html"})
    assert page.status_code == 303
    assert page.headers["location"] == "/enter?next=/runs"
    assert locked.post("/runs", data={"form": "demo"}).status_code == 401


def test_programs_send_the_key(locked):
    good = {"authorization": f"Bearer {KEY}"}
    assert locked.get("/cards", headers=good).status_code == 200
    assert locked.get("/cards", headers={"authorization": "Bearer other"}).status_code == 401


def enter(client, key, after="/"):
    text = client.get("/enter", params={"next": after}).text
    found = re.search(r'name="token" value="([0-9a-f]+)"', text)
    return client.post("/enter", data={"token": found[1], "key": key, "next": after})


def test_people_type_the_key(locked):
    wrong = enter(locked, "other")
    assert wrong.status_code == 401
    assert "not known here" in wrong.text
    assert "set-cookie" not in wrong.headers
    right = enter(locked, KEY, "/runs")
    assert (right.status_code, right.headers["location"]) == (303, "/runs")
    assert COOKIE in right.headers["set-cookie"]
    for word in ("HttpOnly", "SameSite=strict"):
        assert word in right.headers["set-cookie"]
    assert KEY not in right.headers["set-cookie"]
    assert locked.get("/runs").status_code == 200  # the client keeps the cookie
    with httpx.Client(base_url=locked.base_url, cookies={COOKIE: "made-up"}) as other:
        assert other.get("/runs").status_code == 401


@pytest.mark.parametrize("after", ["//evil.example", "https://evil.example", "/\\evil.example"])
def test_the_key_does_not_lead_elsewhere(locked, after):
    assert enter(locked, KEY, after).headers["location"] == "/"


def test_tokens_belong_to_their_session(locked):
    enter(locked, KEY)
    own = token(locked)
    with httpx.Client(base_url=locked.base_url) as other:
        enter(other, KEY)
        answer = other.post("/runs", data={"token": own, "form": "demo"})
        assert answer.status_code == 403


def test_a_broken_cookie_is_no_key(locked):
    raw = http.client.HTTPConnection(locked.base_url.host, locked.base_url.port, timeout=30)
    raw.request("GET", "/cards", headers={"Cookie": 'x="; \x01=;;'})
    assert raw.getresponse().status == 401
    raw.close()
