"""A digest as a letter, through a server that a file (YAML) names.

    host: mail.example.org
    port: 587
    security: starttls              # or tls, from the first byte; or none, on this machine only
    user: pluribus
    password_env: MAIL_PASSWORD     # the environment variable with the password
    sender: pluribus@example.org
    to: [team@example.org]
    ca: private-ca.pem              # certificates to trust instead of the system's

The connection is encrypted before a password or a letter is sent, and the server's certificate is
checked; what cannot be checked is not used.
"""

import os
import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pluribus.core.errors import MissingError, NetworkError, RecipeError
from pluribus.recipe.single import Placed, fault, single
from pluribus.serve.run import is_loopback

SECONDS = 30.0  # for the server to answer


def _address(text: str) -> str:
    name, _, place = text.rpartition("@")
    if not name or not place or not text.isprintable() or any(c in text for c in " ,;<>"):
        raise ValueError(f"{text!r} is no address; expected name@place")
    return text


Address = Annotated[str, AfterValidator(_address)]


class Mail(Placed):
    """Where letters go, and through which server."""

    host: str = Field(min_length=1)
    port: int = Field(default=587, ge=1, le=65535)
    security: Literal["starttls", "tls", "none"] = "starttls"
    user: str | None = None
    password_env: str | None = None
    sender: Address
    to: list[Address] = Field(min_length=1)
    ca: str | None = None

    @model_validator(mode="after")
    def _sound(self) -> "Mail":
        if self.security == "none" and not is_loopback(self.host):
            raise ValueError(
                f"security none sends the letter readable to {self.host}; use starttls or tls"
            )
        if (self.user is None) != (self.password_env is None):
            raise ValueError("give user and password_env together, or neither")
        return self

    def password(self) -> str | None:
        """Return the password. Raises MissingError if its variable is not set."""
        if self.password_env is None:
            return None
        if not os.environ.get(self.password_env):
            raise MissingError(f"{self.password_env} is not set; {self.host} needs the password")
        return os.environ[self.password_env]


def load(path: str | Path) -> Mail:
    """Read a file. Raises RecipeError naming line and key, MissingError with the nearest name."""
    document = single(path, "a file of mail settings")
    try:
        made = Mail.model_validate(document.value)
    except ValidationError as error:
        raise RecipeError(fault(error, str(path), document)) from None
    made._folder = Path(path).expanduser().parent
    return made


def send(mail: Mail, subject: str, text: str, page: str) -> None:
    """Send a letter with a text and a page. Raises NetworkError saying what the server said."""
    letter = EmailMessage()
    letter["Subject"] = " ".join(subject.split())
    letter["From"] = mail.sender
    letter["To"] = ", ".join(mail.to)
    letter["Date"] = formatdate()
    letter["Message-ID"] = make_msgid(domain="pluribus.invalid")
    letter.set_content(text)
    letter.add_alternative(page, subtype="html")
    password = mail.password()
    try:
        trust = ssl.create_default_context(cafile=mail.place(mail.ca) if mail.ca else None)
    except OSError as error:
        raise MissingError(f"ca: {mail.ca}: no certificates could be read ({error})") from None
    where = f"{mail.host}:{mail.port}"
    try:
        if mail.security == "tls":
            server = smtplib.SMTP_SSL(mail.host, mail.port, timeout=SECONDS, context=trust)
        else:
            server = smtplib.SMTP(mail.host, mail.port, timeout=SECONDS)
        with server:
            if mail.security == "starttls":
                server.starttls(context=trust)
            if mail.user is not None and password is not None:
                server.login(mail.user, password)
            refused = server.send_message(letter)
    except ssl.SSLError as error:
        raise NetworkError(
            f"{where}: the certificate was not accepted or TLS failed ({error.reason or error}); "
            "give ca for a private one"
        ) from None
    except (smtplib.SMTPException, OSError) as error:
        raise NetworkError(f"{where}: the letter was not sent ({_said(error)})") from None
    if refused:
        raise NetworkError(f"{where}: did not take the letter for {', '.join(refused)}")


def _said(error: Exception) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        told = error.smtp_error
        words = told.decode("utf-8", "replace") if isinstance(told, bytes) else str(told)
        return f"{error.smtp_code} {words}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
