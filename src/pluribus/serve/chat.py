"""The terminal client: a conversation, with commands to change and compare models.

In a terminal answers are shown as they come and set as Markdown once they are whole; elsewhere
plain text goes out, without control codes.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from pluribus.core.errors import PluribusError, nearest

HELP = {
    "/models": "list the models; * is the one that answers",
    "/use NAME": "let another one answer from now on",
    "/compare [TEXT]": "ask all the same: TEXT, or the last question again",
    "/system TEXT": "say first what the models are to be",
    "/clear": "begin anew",
    "/save FILE": "write the conversation: Markdown, or JSON for *.json",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D)",
}


class Asked(Protocol):
    """What a conversation needs of a client."""

    def models(self) -> list[str]:
        """Return names."""
        ...

    def stream(self, model: str, messages: Any, **settings: Any) -> Iterator[str]:
        """Yield text."""
        ...


class Chat:
    """One conversation. `console` is rich's; its `is_terminal` decides how answers look.

    With `whole` an answer is shown when it is complete.
    """

    def __init__(
        self,
        client: Asked,
        console: Any,
        complain: Callable[[str], None],
        *,
        model: str | None = None,
        system: str | None = None,
        whole: bool = False,
        **settings: Any,
    ) -> None:
        self.client, self.console, self.complain = client, console, complain
        self.settings, self.whole = settings, whole
        self.names = client.models()
        if not self.names:
            raise PluribusError("the server has no models")
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.failed = False  # whether anything went wrong
        self.model = self.names[0] if model is None else self._known(model)

    @property
    def said(self) -> list[dict[str, str]]:
        """The conversation, what the system said first included."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.messages]

    def run(self, read: Callable[[], str]) -> None:
        """Take lines until `read` raises EOFError or somebody quits."""
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt: the line is given up
                self._out("")
                continue
            if line in ("/quit", "/exit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Do what one line says; errors are told, and the conversation goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                self.ask(line)
        except PluribusError as error:
            self.failed = True
            self.complain(str(error))

    def ask(self, question: str) -> None:
        """Ask the model in use, and remember both."""
        asked = {"role": "user", "content": question}
        answer = self._answer(self.model, [*self.messages, asked])
        if answer:
            self.messages += [asked, {"role": "assistant", "content": answer}]

    def compare(self, question: str, before: list[dict[str, str]] | None = None) -> None:
        """Ask all models the same, after what was said `before` or until now.

        The answer of the one in use is remembered.
        """
        asked = {"role": "user", "content": question}
        before, kept = list(self.messages) if before is None else before, ""
        for name in self.names:
            self._title(name)
            try:
                answer = self._answer(name, [*before, asked])
            except PluribusError as error:
                self.failed = True
                self.complain(f"{name}: {error}")
                continue
            if name == self.model:
                kept = answer
        if kept:
            self.messages = [*before, asked, {"role": "assistant", "content": kept}]

    # -- showing -----------------------------------------------------------------------------------

    def _answer(self, model: str, messages: list[dict[str, str]]) -> str:
        """Show an answer as it comes and return it; Ctrl-C ends it, and what there is counts."""
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        pieces: list[str] = []
        stopped = False
        thoughts: dict[str, str] = {}  # by worker

        def thought(worker: str, text: str) -> None:
            thoughts[worker] = thoughts.get(worker, "") + text

        shown = self.console.is_terminal and not self.whole
        settings = {**self.settings, "thought": thought} if shown else self.settings
        with closing(self.client.stream(model, messages, **settings)) as stream:  # type: ignore[type-var]
            try:
                self._show(stream, pieces, thoughts)
            except KeyboardInterrupt:
                stopped = True
        text = "".join(pieces)
        if self.console.is_terminal:
            from rich.markdown import Markdown

            self.console.print(Markdown(_harmless(text)))
        else:
            self._out("")
        if stopped:
            self._out("(stopped)")
        return text

    def _show(self, stream: Iterator[str], pieces: list[str], thoughts: Mapping[str, str]) -> None:
        """Show pieces as they come; on a terminal, workers side by side until they answer."""
        if self.whole:
            pieces.extend(stream)
            if not self.console.is_terminal:
                self.console.file.write("".join(pieces))
            return
        if not self.console.is_terminal:
            for piece in stream:
                pieces.append(piece)
                self.console.file.write(piece)
                self.console.file.flush()
            return
        from rich.live import Live
        from rich.text import Text

        with Live(console=self.console, transient=True, refresh_per_second=12) as live:
            for piece in stream:
                if piece:
                    pieces.append(piece)
                text = "".join(pieces)
                live.update(Text(self._last(text)) if text else self._side_by_side(thoughts))

    def _last(self, text: str, width: int | None = None) -> str:
        """Return the last lines: those are new, and a screen holds no more of them."""
        rows = max(self.console.height - 3, 1)
        wide = self.console.width if width is None else width
        lines = []
        for line in _harmless(text[-wide * rows :]).splitlines():
            lines += [line[i : i + wide] for i in range(0, len(line), wide)] or [""]
        return "\n".join(lines[-rows:])

    def _side_by_side(self, thoughts: Mapping[str, str]) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, expand=True, padding=(0, 1))
        width = max(self.console.width // max(len(thoughts), 1) - 2, 1)
        for worker in thoughts:
            table.add_column(_harmless(worker), ratio=1, style="dim", overflow="fold")
        table.add_row(*(Text(self._last(text, width)) for text in thoughts.values()))
        return table

    def _title(self, name: str) -> None:
        if self.console.is_terminal:
            self.console.rule(name, align="left")
        else:
            self._out(f"== {name}")

    def _out(self, text: str) -> None:
        self.console.file.write(f"{text}\n")
        self.console.file.flush()

    # -- commands ----------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        known: dict[str, Callable[[str], None]] = {
            "/models": self._models,
            "/use": self._use,
            "/compare": self._compare,
            "/system": self._system,
            "/clear": self._clear,
            "/save": self._save,
            "/help": self._help,
        }
        if name not in known:
            hint = nearest(name, [*known, "/quit"])
            raise PluribusError(f"there is no command {name}; /help lists them.{hint}")
        known[name](rest)

    def _models(self, _: str) -> None:
        self.names = self.client.models()
        for name in self.names:
            self._out(f"{'*' if name == self.model else ' '} {name}")

    def _use(self, name: str) -> None:
        self.model = self._known(name)
        self._out(f"{name} answers")

    def _known(self, name: str) -> str:
        if name not in self.names:
            hint = nearest(name, self.names)
            raise PluribusError(f"no model {name!r}; there are: {', '.join(self.names)}.{hint}")
        return name

    def _compare(self, question: str) -> None:
        if not question:
            if not self.messages:
                raise PluribusError("nothing was asked yet; give /compare a question")
            self.compare(self.messages[-2]["content"], self.messages[:-2])
            return
        self.compare(question)

    def _system(self, text: str) -> None:
        self.system = text or None

    def _clear(self, _: str) -> None:
        self.messages = []

    def _save(self, name: str) -> None:
        if not name:
            raise PluribusError("give /save a file's name")
        try:
            path = Path(name).expanduser()
        except RuntimeError as error:  # ~somebody who has no home
            raise PluribusError(f"{name}: {error}") from None
        said = self.said
        if path.suffix == ".json":
            text = json.dumps({"model": self.model, "messages": said}, indent=2, ensure_ascii=False)
        else:
            text = "\n\n".join(f"**{m['role']}**\n\n{m['content']}" for m in said)
        try:
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise PluribusError(f"{path} exists; choose another name") from None
        except OSError as error:
            raise PluribusError(f"{path}: {error.strerror}") from None
        self._out(f"{len(self.messages) // 2} questions and answers are in {path}")

    def _help(self, _: str) -> None:
        for name, does in HELP.items():
            self._out(f"{name:16} {does}")


def _harmless(text: str) -> str:
    """Return a text without characters that would steer a terminal: models write anything."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
