"""The command line. No logic: it reads options, calls the public functions, prints. torch is imported in commands."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from spherify.errors import OptionError, SpherifyError
from spherify.version import __version__

WIDTH_WITHOUT_TERMINAL = 140
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


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="resnet18, timm:resnet18, torchvision:resnet18.")],
    operator: Annotated[str, typer.Option(help="cosine, linear, sigmoid, learnable.")] = "cosine",
    k: Annotated[float | None, typer.Option(help="Softness of sigmoid (0.3) and learnable (0.5 at first).")] = None,
    k_shared: Annotated[str, typer.Option(help="What shares a learned k: filter, layer, network.")] = "filter",
    eps: Annotated[float, typer.Option(help="Added to squared norms, inside the root.")] = 1e-4,
    skip_shortcuts: Annotated[
        bool, typer.Option("--skip-shortcuts", help="Keep the 1x1 projections of residual blocks.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Convert these alone: a glob on names, @role, type:Class, re:... (repeatable)."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep these; selectors as for --include.")] = None,
    linear: Annotated[bool, typer.Option(help="Convert linear layers too.")] = True,
    head: Annotated[str, typer.Option(help="The classifier: keep, or convert like any layer.")] = "keep",
    norm: Annotated[str, typer.Option(help="BatchNorms behind converted layers: keep, remove.")] = "keep",
    activation: Annotated[str, typer.Option(help="Activations behind converted layers: keep, remove.")] = "keep",
    gain: Annotated[
        str, typer.Option(help="Learned gain and bias: auto (where no BatchNorm follows), none, learned.")
    ] = "auto",
    bias: Annotated[str, typer.Option(help="Biases of converted layers: keep, drop.")] = "keep",
    num_classes: Annotated[int | None, typer.Option(help="Size of the classifier.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the library's weights.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from this file: .safetensors, .pth, .th.", metavar="FILE")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write [default: MODEL-OPERATOR].", metavar="DIR")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    seed: Annotated[int, typer.Option(help="Of the initial weights.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert a model and write it to a folder (the default command)."""
    from rich.console import Console

    from spherify.convert import plan
    from spherify.export.folder import check_target, save
    from spherify.plan.table import print_plan

    folder = output or Path(re.sub(r"[^\w.-]+", "-", f"{model}-{operator}"))
    if not dry_run:
        check_target(folder)
    report = plan(
        model,
        operator=operator,
        k=k,
        k_shared=k_shared,
        eps=eps,
        skip_shortcuts=skip_shortcuts,
        include=include or (),
        exclude=exclude or (),
        linear=linear,
        head=head,
        norm=norm,
        activation=activation,
        gain=gain,
        bias=bias,
        num_classes=num_classes,
        pretrained=pretrained,
        checkpoint=checkpoint,
        seed=seed,
    )
    converted = report.apply(inplace=True)
    messages = Console(stderr=True, soft_wrap=True)
    if not dry_run:  # before anything is printed: `| head` must not keep it from being written
        save(converted, folder)
    if as_json:
        for note in report.notes:
            messages.print(f"note: {note}", markup=False)
    else:
        print_plan(report, terminal())
    if not dry_run:
        size = (folder / "model.safetensors").stat().st_size / 1e6
        place = messages if as_json else terminal()
        place.print(f"Wrote {folder}: model.safetensors ({size:.1f} MB), config.json", markup=False, highlight=False)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))


@app.command(name="list")
def list_names(
    what: Annotated[str, typer.Argument(help="models, operators, heads, roles.")] = "operators",
    pattern: Annotated[str, typer.Argument(help="A glob on the names.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List models, operators, heads or roles."""
    from fnmatch import fnmatchcase

    found = {
        name: text for name, text in catalogue(what, pattern).items() if what == "models" or fnmatchcase(name, pattern)
    }
    if not found:
        raise OptionError(f"no name among the {what} matches {pattern!r}.")
    if as_json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:{width}}  {text}".rstrip())


def catalogue(what: str, pattern: str) -> dict[str, str]:
    """Names and a line about each."""
    if what == "models":
        from spherify.models.resolve import list_models

        return dict.fromkeys(list_models(pattern), "")
    if what == "operators":
        from spherify.functional.responses import RESPONSES

        return {name: entry.summary for name, entry in RESPONSES.items() if not entry.is_hidden}
    if what == "heads":
        from spherify.plan.options import HEADS

        return dict(HEADS)
    if what == "roles":
        from spherify.graph.roles import ROLES

        return {name: (role.__doc__ or "").strip().splitlines()[0] for name, role in ROLES.items()}
    raise OptionError(f"there is no list of {what!r}; choose one of: models, operators, heads, roles.")


def terminal() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=WIDTH_WITHOUT_TERMINAL)


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
