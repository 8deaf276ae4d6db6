"""Letters: over TLS with a certificate that is checked, or not at all."""

import email
import email.policy

import pytest
from smtp_server import OPENSSL, PASSWORD, USER, Server, certificate

from pluribus.core.errors import MissingError, NetworkError, RecipeError
from pluribus.ui import mail

SETTINGS = """\
host: localhost
port: {port}
security: {security}
user: pluribus
password_env: MAIL_PASSWORD
sender: pluribus@example.org
to: [one@example.org, two@example.org]
ca: cert.pem
"""
needs_openssl = pytest.mark.skipif(not OPENSSL, reason="openssl is not installed")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("certificate"))


def settings(folder, number=25, kind="starttls", **changes):
    text = SETTINGS.format(port=number, security=kind)
    for old, new in changes.items():
        text = "\n".join(new if line.startswith(f"{old}:") else line for line in text.split("\n"))
    path = folder / "mail.yml"
    path.write_text(text)
    return path


@needs_openssl
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_letter_arrives(security, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("MAIL_PASSWORD", PASSWORD)
    (tmp_path / "cert.pem").write_bytes(pair[1].read_bytes())
    page = f"<p>wide {'x' * 2000} ü</p>\n.\n.dots"
    with Server(pair, security) as server:
        made = mail.load(settings(tmp_path, server.port, security))
        mail.send(made, "new\r\nBcc: evil@example.org", "a text ü", page)
    (letter,) = server.letters
    assert (letter.sender, letter.to) == (
        "pluribus@example.org",
        ["one@example.org", "two@example.org"],
    )
    assert letter.encrypted
    assert letter.user == USER
    told = email.message_from_bytes(letter.body, policy=email.policy.default)
    assert told["Subject"] == "new Bcc: evil@example.org"  # one header, whatever the title
    assert told["Bcc"] is None
    text, shown = told.iter_parts()
    assert text.get_content().strip() == "a text ü"
    assert shown.get_content_type() == "text/html"
    assert shown.get_content().strip().replace("\r\n", "\n") == page


@needs_openssl
def test_nothing_is_said_to_a_server_that_is_not_trusted(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("MAIL_PASSWORD", PASSWORD)
    with Server(pair, "starttls") as server:
        made = mail.load(settings(tmp_path, server.port, ca=""))
        with pytest.raises(NetworkError, match="certificate was not accepted"):
            mail.send(made, "new", "text", "<p>")
    assert server.letters == []
    assert "AUTH" not in server.commands
    assert "MAIL" not in server.commands


def test_no_letter_to_a_server_without_tls(tmp_path, monkeypatch):
    monkeypatch.setenv("MAIL_PASSWORD", PASSWORD)
    with Server(None, "none") as server:
        made = mail.load(settings(tmp_path, server.port, ca=""))
        with pytest.raises(NetworkError, match="STARTTLS"):
            mail.send(made, "new", "text", "<p>")
        assert "AUTH" not in server.commands
        plain = mail.load(settings(tmp_path, server.port, "none", ca="", user="", password_env=""))
        mail.send(plain, "new", "text", "<p>")
    (letter,) = server.letters
    assert not letter.encrypted


def test_what_the_server_says_is_told(tmp_path, monkeypatch):
    bare = {"ca": "", "user": "", "password_env": ""}
    with Server(None, "none", refuses=True) as server:
        made = mail.load(settings(tmp_path, server.port, "none", **bare))
        with pytest.raises(NetworkError, match=r"localhost:\d+: the letter was not sent"):
            mail.send(made, "new", "text", "<p>")
    assert server.letters == []
    with pytest.raises(NetworkError, match="the letter was not sent"):  # nobody listens any more
        mail.send(made, "new", "text", "<p>")
    monkeypatch.setenv("MAIL_PASSWORD", "wrong")
    with Server(None, "none") as server:
        made = mail.load(settings(tmp_path, server.port, "none", ca=""))
        with pytest.raises(NetworkError, match="535 who are you"):
            mail.send(made, "new", "text", "<p>")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"port": "prt: 25"}, "'port'"),
        ({"security": "security: ssl"}, "starttls"),
        ({"host": "host: mail.example.org", "security": "security: none"}, "readable to mail"),
        ({"user": ""}, "user and password_env together"),
        ({"sender": "sender: nobody"}, "expected name@place"),
        ({"to": 'to: ["a@b.org, c@d.org"]'}, "expected name@place"),
        ({"to": "to: []"}, "at least one"),
        ({"port": "port: 99999"}, "65535"),
    ],
)
def test_settings_that_are_refused(changes, said, tmp_path):
    with pytest.raises(RecipeError) as error:
        mail.load(settings(tmp_path, **changes))
    assert "mail.yml" in str(error.value)
    assert said in str(error.value)


def test_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("MAIL_PASSWORD", raising=False)
    with pytest.raises(MissingError, match=r"mail\.yml"):
        mail.load(settings(tmp_path).with_name("mial.yml"))
    made = mail.load(settings(tmp_path))
    with pytest.raises(MissingError, match="MAIL_PASSWORD is not set"):
        mail.send(made, "new", "text", "<p>")
    monkeypatch.setenv("MAIL_PASSWORD", PASSWORD)
    with pytest.raises(MissingError, match=r"ca: cert\.pem"):
        mail.send(made, "new", "text", "<p>")
