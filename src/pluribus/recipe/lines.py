"""Files of texts that recipes name: JSON objects a line, or plain lines; read strictly."""

import json
from pathlib import Path

from pluribus.core.errors import FormatError, InputError, MissingError


def read(path: str, labelled: bool) -> list[dict[str, str]]:
    """Read a file of texts: JSON objects with `text` (and `answer`), or plain lines.

    Raises MissingError, FormatError with the line that is at fault, InputError if there is no text,
    or no answer to one where `labelled` asks for them.
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; data is a file of texts, such as texts.jsonl")
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file of texts") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason})") from None
    found: list[dict[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            found.append({"text": line})
            continue
        try:
            row = json.loads(line)
            given = {"text": row["text"], **({"answer": row["answer"]} if "answer" in row else {})}
        except (ValueError, KeyError, TypeError):
            raise FormatError(f'{path}, line {number}: expected {{"text": ...}}') from None
        for key, value in given.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise FormatError(f"{path}, line {number}: {key} is {value!r}, which is no text")
        kept = {key: str(value) for key, value in given.items()}
        if not kept["text"].strip():
            continue
        if labelled and not kept.get("answer", "").strip():
            raise InputError(
                f"{path}, line {number}: the objective needs labels; give rows "
                '{"text", "answer"}, with an answer that is not empty'
            )
        found.append(kept)
    if not found:
        raise InputError(f"{path}: holds no text")
    if labelled and not path.endswith(".jsonl"):
        raise InputError(
            f'{path}: the objective needs labels; give rows {{"text", "answer"}} in a .jsonl file'
        )
    return found
