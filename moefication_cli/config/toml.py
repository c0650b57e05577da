"""TOML files with one table per command: read strictly, options by their names in Python. Imports nothing heavy."""

import tomllib
from pathlib import Path
from typing import Any

from moefication_cli.errors import ConfigError


def read_tables(path: str, option: str) -> dict[str, dict[str, Any]]:
    """The tables of the file that `option` names, keys with dashes or underscores. Raises ConfigError."""
    try:
        if not Path(path).is_file() and Path(path).exists():  # reading a pipe or a device could wait for ever
            raise ConfigError(f"{option} {path} is not a file")
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {path} is not UTF-8 text") from None
    except ValueError as error:
        if isinstance(error, tomllib.TOMLDecodeError):
            raise ConfigError(f"{option} {path} is not valid TOML: {error}") from None
        raise ConfigError(f"{option} {path!r} is not a path") from None
    stray = [key for key, value in tables.items() if not isinstance(value, dict)]
    if stray:
        raise ConfigError(
            f"{option} {path}: `{stray[0]}` stands outside a table", "write one table per command: [split]"
        )
    return {name: {key.replace("-", "_"): value for key, value in table.items()} for name, table in tables.items()}
