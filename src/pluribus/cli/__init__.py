"""The command line: results on stdout, progress on stderr, one line for what went wrong.

A command is one file here that defines `register(app)`; it holds no logic of its own.
"""

import importlib
import os
import pkgutil
import sys
from typing import NoReturn


def build():
    """Return the application with every command of this package."""
    import typer

    app = typer.Typer(
        name="pluribus",
        help="Out of many, one: merge, compress and compare fine-tuned models.",
        no_args_is_help=True,
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

    @app.callback()
    def root(
        show: bool = typer.Option(
            False, "--version", callback=version, is_eager=True, help="Print the version and stop."
        ),
        debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors."),
    ) -> None:
        if debug:
            os.environ["PLURIBUS_DEBUG"] = "1"

    return app


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; exit 0 on success, 1 on an error of the input, 2 on bad usage."""
    import click

    from pluribus.core.errors import PluribusError

    try:
        build()(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        leave(stop.exit_code)
    except click.ClickException as error:
        error.show()
        leave(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; run the same command again to go on", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141)
    except PluribusError as error:
        if os.environ.get("PLURIBUS_DEBUG"):
            raise
        fail(str(error), 1)
    except MemoryError:
        fail("out of memory; give a smaller --memory or fewer --threads", 1)
    except Exception as error:
        if os.environ.get("PLURIBUS_DEBUG"):
            raise
        fail(
            f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback, "
            "and please report it)",
            70,
        )
    leave(0)


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr and exit."""
    print(f"pluribus: {' '.join(message.split())}", file=sys.stderr)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit; large imports have nothing to tidy up, so their slow teardown is skipped."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if "pytest" not in sys.modules and not os.environ.get("PLURIBUS_DEBUG"):
            os._exit(code)
        sys.exit(code)
