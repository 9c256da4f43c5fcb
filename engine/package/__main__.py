"""The command `seqjepa`, also `python -m seqjepa`: its first word is the command of a module, which reads the rest."""

# PYTHON_ARGCOMPLETE_OK

import importlib
import os
import sys
from importlib.metadata import version

COMMANDS = {
    "train": ("engine.train", "train a network"),
    "eval": ("engine.evaluate", "fit probes on a trained network and on its untrained control"),
    "compare": ("engine.compare", "make a table of several runs, or list all of them"),
    "show": ("loaders.show", "draw a contact sheet of views and actions"),
    "write": ("loaders.write", "write a data set as betons, FFCV's files"),
    "remote": ("engine.remote", "look at a file that rents a machine, before it costs money"),
    "export": ("engine.export", "write the encoder of a run to a folder, for other code"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code; each command's help lists them."""
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "seqjepa":
            raise
        missing = f"{error.name.partition('.')[0]} is not installed"
        print(f"error: {missing}; pip install 'seqjepa[train]', in a clone pip install '.[train]'", file=sys.stderr)
        return 2


def _run(argv: list[str] | None) -> int:
    from seqjepa.configs.console import Parser, open_console

    open_console()
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="seqjepa", description="Train seq-JEPA and its relatives.", epilog="seqjepa COMMAND --help says more."
    )
    parser.add_argument("--version", action="version", version=f"seqjepa {version('seqjepa')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, add_help=False)
        if "_ARGCOMPLETE" in os.environ and f" {name} " in os.environ.get("COMP_LINE", ""):
            importlib.import_module(f"seqjepa.{module}").add_words(command)
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    chosen = parser.parse_args(words[:1]).command
    return importlib.import_module(f"seqjepa.{COMMANDS[chosen][0]}").main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
