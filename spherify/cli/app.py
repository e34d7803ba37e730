"""The commands put together, and what becomes of errors: exit 0 done, 1 failed, 2 called wrongly."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from spherify.cli.bench import bench
from spherify.cli.calibrate import calibrate
from spherify.cli.convert import convert
from spherify.cli.evaluate import evaluate
from spherify.cli.export import export
from spherify.cli.list_names import list_names
from spherify.cli.train import train
from spherify.errors import OptionError, SpherifyError
from spherify.version import __version__

GROUP_FLAGS = ("--help", "--version", "--install-completion", "--show-completion")
COMPLETION = "_SPHERIFY_COMPLETE"

app = typer.Typer(
    name="spherify",
    help="Rebuild torchvision and timm networks on angles: spherify MODEL [OPTIONS].",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"spherify {__version__}")
        raise typer.Exit


@app.callback()
def group(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(convert)
app.command()(train)
app.command()(evaluate)
app.command()(calibrate)
app.command(name="list")(list_names)
app.command()(export)
app.command()(bench)


def with_default_command(arguments: list[str]) -> list[str]:
    """``spherify resnet18 ...`` is ``spherify convert resnet18 ...``."""
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    if not arguments or arguments[0] in commands or arguments[0] in GROUP_FLAGS:
        return arguments
    return ["convert", *arguments]


def main() -> None:
    """Run the command line; exit 0 done, 1 failed, 2 called wrongly, with one line on standard error."""
    arguments = sys.argv[1:] or ["--help"]
    if COMPLETION in os.environ:
        app(prog_name="spherify")
    try:
        code = app(with_default_command(arguments), prog_name="spherify", standalone_mode=False)
        if arguments == ["--help"]:  # the default command has most of the options
            print()
            app(["convert", "--help"], prog_name="spherify", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):  # some parsers make the first into the second
        sys.exit(130)
    except (BrokenPipeError, SystemExit) as error:  # rich and the parser make the first into the second
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)  # the reader, head or less, has seen enough
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        sys.exit(report_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def report_error(error: Exception) -> int:
    """One line on standard error; the exit code."""
    if hasattr(error, "format_message"):  # the parser's own errors, whichever parser typer has inside
        text, code = f"{error.format_message().rstrip('.')}. See `spherify --help`.", 2
    elif isinstance(error, SpherifyError):
        text, code = str(error), 2 if isinstance(error, OptionError) else 1
    else:
        text, code = f"unexpected {type(error).__name__}: {error}; run again with --debug to see where.", 1
    print(f"spherify: {' '.join(text.split())}", file=sys.stderr)
    return code
