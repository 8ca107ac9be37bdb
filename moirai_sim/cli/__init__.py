"""The command line: one thin function a command, in one module a group.

Every heavy import waits inside the command that needs it.
"""

from __future__ import annotations

import os
import select
import sys
from typing import Annotated, NoReturn

import typer

from moirai_sim.cli import about, costs, generation, placements, studies
from moirai_sim.errors import InputError, InternalError, MoiraiError

app = typer.Typer(
    name="moirai-sim",
    help="Which device should run which operator of my network, how fast will it be, and how sure are we?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profile = typer.Typer(help="Measure operators and links, or read published measurements.", no_args_is_help=True)
app.add_typer(profile, name="profile")
for command in (
    about.quickstart, about.doctor, about.catalog, about.graph, costs.predict,
    placements.place, placements.simulate, placements.verify, placements.measure, generation.generate,
    studies.validate, studies.evaluate, studies.whatif, studies.report, about.schema, costs.calibrate,
):  # fmt: skip
    app.command()(command)
profile.command("operators")(costs.profile_operators)
profile.command("links")(costs.profile_links)
profile.command("in-place")(costs.profile_in_place)
profile.command("import")(costs.profile_import)


_STOPPED = 130
"""Exit code after Ctrl-C."""
_STOPPED_TEXT = "stopped; finished results are kept, nothing is half-written\n"


def main() -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 wrong input, 3 no answer, 4 our bug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        code = app(args=arguments, prog_name="moirai-sim", standalone_mode=False) or 0
        if code == _STOPPED:
            sys.stderr.write(_STOPPED_TEXT)
        sys.stdout.flush()
        sys.exit(code)
    except SystemExit as leaving:  # by which typer answers a closed pipe, whichever it was
        if not isinstance(leaving.__context__, BrokenPipeError) or not _reader_has_left():
            raise
        _leave_quietly()
    except MoiraiError as error:
        if debug:
            raise
        for problem in getattr(error, "problems", None) or [str(error)]:
            sys.stderr.write(f"error: {problem}\n")
        sys.exit(error.exit_code)
    except usage_error as error:
        text = error.format_message()  # type: ignore[attr-defined]
        help_alone = text.startswith("Usage:")  # a bare `moirai-sim` or `moirai-sim profile`
        sys.stderr.write(text + "\n" if help_alone else f"error: {text}; see moirai-sim --help\n")
        sys.exit(InputError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(_STOPPED_TEXT)
        sys.exit(_STOPPED)
    except BrokenPipeError:
        _leave_quietly()
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.stderr.write(f"error: a bug of moirai-sim: {what}; run it again with --debug and please report it\n")
        sys.exit(InternalError.exit_code)


def _reader_has_left() -> bool:
    """Tell whether nobody reads standard output any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _leave_quietly() -> NoReturn:
    """Exit: who read our output has enough, as in ``... | head``. What is left of it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Say which device should run which operator of a network, how fast it will be, and how sure that is."""
