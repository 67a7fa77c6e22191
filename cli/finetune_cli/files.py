"""Reading what the user names on the command line."""

import sys

from finetune_cli.errors import CliError, Exit


def read(file: str) -> str:
    """The text of a file, or of standard input for `-`."""
    if file == "-":
        return sys.stdin.read()
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise CliError(f"{file} is not UTF-8 text", Exit.USAGE) from error
    except OSError as error:
        raise CliError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}", Exit.USAGE) from error
