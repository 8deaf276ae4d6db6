"""The command line: results on stdout, progress on stderr, one line for what went wrong.

A command is one file here that defines `register(app)`; it holds no logic of its own.

Exit codes: 0 done, 1 the input or the output's place is at fault (or a claim fails), 2 bad usage,
70 a bug of ours, 130 interrupted, 141 nobody reads stdout any more.
"""

import contextlib
import importlib
import io
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

MEMORY = "out of memory; give smaller sizes or batches, a smaller --memory or fewer --threads"


def build():
    """Return the application with every command of this package."""
    import typer

    app = typer.Typer(
        name="pluribus",
        help="Out of many, one: merge, compress and compare fine-tuned models.",
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"{__name__}.{module}").register(app)

    def version(value: bool) -> None:
        if value:
            from pluribus import __version__

            print(f"pluribus {__version__}")
            raise typer.Exit

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        show: bool = typer.Option(
            False, "--version", callback=version, is_eager=True, help="Print the version and stop."
        ),
        debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors."),
    ) -> None:
        if debug:
            os.environ["PLURIBUS_DEBUG"] = "1"
        if context.invoked_subcommand is None:
            print(context.get_help(), file=sys.stderr)
            raise typer.Exit(2)

    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with one of the codes above."""
    from pluribus.core.errors import PluribusError

    _open_streams()
    warnings.showwarning = _show_warning
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail(
            "interrupted; run the same command again: what keeps a journal (a merge, a search with "
            "--store, claims) goes on where it stopped",
            130,
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141)
    except PluribusError as error:
        if os.environ.get("PLURIBUS_DEBUG"):
            raise
        fail(str(error), 1)
    except MemoryError:
        fail(MEMORY, 1)
    except Exception as error:
        if os.environ.get("PLURIBUS_DEBUG"):
            raise
        if isinstance(error, OSError) and error.strerror:
            where = "" if error.filename is None else f"{error.filename}: "
            fail(f"{where}cannot be read or written: {error.strerror}", 1)
        if isinstance(error, RuntimeError) and "allocate" in str(error) and "memory" in str(error):
            fail(MEMORY, 1)  # torch's way of saying it, for every kind of memory
        fail(
            f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback, "
            "and please report it)",
            70,
        )
    leave(code)


def _run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; what it raises goes through as it is.

    Typer's own `main` would turn an interrupt and a closed pipe into exit codes on the way.
    """
    import typer

    command = typer.main.get_command(build())
    if "_PLURIBUS_COMPLETE" in os.environ:  # the shell asks what could be typed next
        command.main(args=list(arguments), prog_name="pluribus")
    try:
        with command.make_context("pluribus", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        told = getattr(error, "format_message", None)  # what a usage error has in every typer
        if told is None:
            raise
        context = getattr(error, "ctx", None)
        where = "pluribus" if context is None else context.command_path
        said = told() if told().endswith((".", "?")) else f"{told()}."
        fail(f"{said} Try: {where} --help", getattr(error, "exit_code", 2))
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from pluribus.cli._common import warn

    warn(str(message))


def _open_streams() -> None:
    """Give a process that was started with closed streams ones that go nowhere.

    Python has None for them, and the first file that is opened would get their number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as we run
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal can't show is no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    with contextlib.suppress(OSError):
        print(f"pluribus: {' '.join(message.split())}", file=sys.stderr, flush=True)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit; large imports have nothing to tidy up, so their slow teardown is skipped."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if "pytest" not in sys.modules and not os.environ.get("PLURIBUS_DEBUG"):
        os._exit(code)
    sys.exit(code)
