"""A mail server of a few commands, with and without TLS, that keeps the letters it takes."""

import base64
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

USER, PASSWORD = "pluribus", "a secret"


class Letter(NamedTuple):
    """What was taken: who sent it, whom it is for, its bytes, and how it came."""

    sender: str
    to: list[str]
    body: bytes
    encrypted: bool
    user: str


def certificate(folder: Path) -> tuple[Path, Path]:
    """A key and a certificate for localhost that it signs itself."""
    key, made = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(made), "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return key, made


OPENSSL = shutil.which("openssl") is not None


class Server:
    """Takes letters until it is closed, one connection after another."""

    def __init__(self, pair: tuple[Path, Path] | None, security: str, refuses: bool = False):
        self.security, self.refuses = security, refuses
        self.letters: list[Letter] = []
        self.commands: list[str] = []
        self.trust = None
        if pair is not None:
            self.trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.trust.load_cert_chain(pair[1], pair[0])
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.thread.join(30)

    def _serve(self) -> None:
        while True:
            try:
                talk, _ = self.listening.accept()
            except OSError:
                return
            try:
                with talk:
                    self._talk(talk)
            except OSError:
                continue  # the client would not go on, as with a certificate it does not trust

    def _talk(self, talk: socket.socket) -> None:
        encrypted = self.security == "tls"
        if encrypted:
            assert self.trust is not None
            talk = self.trust.wrap_socket(talk, server_side=True)
        talk.settimeout(30)
        lines = talk.makefile("rb")
        sender, to, user = "", [], ""
        say = lambda text: talk.sendall(text.encode() + b"\r\n")  # noqa: E731
        say("220 localhost")
        while line := lines.readline():
            text = line.decode().strip()
            word = text.split(" ")[0].upper()
            self.commands.append(word)
            if word == "EHLO":
                say("250-localhost")
                if self.security == "starttls" and not encrypted:
                    say("250-STARTTLS")
                say("250 AUTH PLAIN")
            elif word == "STARTTLS":
                say("220 go on")
                assert self.trust is not None
                talk = self.trust.wrap_socket(talk, server_side=True)
                lines, encrypted = talk.makefile("rb"), True
            elif word == "AUTH":
                _, name, password = base64.b64decode(text.split(" ")[2]).decode().split("\0")
                if (name, password) != (USER, PASSWORD):
                    say("535 who are you")
                    continue
                user = name
                say("235 welcome")
            elif word == "MAIL":
                sender = text.split("<")[1].split(">")[0]
                say("250 fine")
            elif word == "RCPT":
                to.append(text.split("<")[1].split(">")[0])
                say("550 nobody here by that name" if self.refuses else "250 fine")
            elif word == "DATA":
                say("354 go on")
                body = b""
                while (part := lines.readline()) != b".\r\n":
                    body += part.removeprefix(b".") if part.startswith(b"..") else part
                self.letters.append(Letter(sender, to, body, encrypted, user))
                say("250 taken")
            elif word == "QUIT":
                say("221 bye")
                return
            else:
                say("250 fine")
