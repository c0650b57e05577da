"""The reference of all commands and options as Markdown, made from what the command line itself is made from.

`python -m moefication_cli.cli.reference > artifacts/reference.md`
"""

import inspect
from typing import Any, Literal, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from moefication_cli.cli.app import app
from moefication_cli.cli.guide import GUIDE
from moefication_cli.config.option import PANELS

_HEAD = """# Reference

Made by `python -m moefication_cli.cli.reference > artifacts/reference.md` from the options themselves; `--help` says the same.

An option's value is taken from the command line, else from `MOEFICATION_<OPTION>`, else from the command's table in the file of
`--config`, else it is the default. Exit codes: 0 done or up to date, 1 failure, 2 usage, 3 upstream missing or stale, 4 corrupt
artifact, 5 locked, 75 run again (ended early by SIGUSR1), 128 + signal when stopped.

With `--progress json` stderr has one JSON object per line, `{"event": "progress", "stage": ..., "done": ..., "total": ...,
"seconds": ...}` at most once a second per loop (`total` is null where it is not known) and `{"event": "message", "text": ...}` for
what is said; errors stay plain text. `NO_COLOR` is honoured. `moefication --install-completion` teaches the shell run directories,
stages and options.
"""


def reference() -> str:
    """One section per panel of the list of commands, one table of options per command."""
    commands = {str(command.name): command.callback for command in app.registered_commands}
    parts = [_HEAD]
    for panel in dict.fromkeys(guide.panel for guide in GUIDE.values()):
        parts.append(f"## {panel}\n")
        parts += [_section(name, commands[name]) for name, guide in GUIDE.items() if guide.panel == panel]
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    lines = [f"### {name}\n", inspect.cleandoc(command.__doc__), "", f"    moefication {GUIDE[name].example}", ""]
    tables: dict[str, list[str]] = {panel: [] for panel in PANELS}
    for parameter in inspect.signature(command).parameters.values():
        hint, info = (*get_args(parameter.annotation), None, None)[:2]
        if isinstance(info, ArgumentInfo):
            lines.append(f"- `{info.metavar}`: {info.help}")
        elif isinstance(info, OptionInfo):
            tables[str(info.rich_help_panel)].append(_row(hint, info, parameter.default))
    lines += ["", "| option | value | default | meaning |", "|---|---|---|---|"]
    for panel, rows in tables.items():
        lines += [f"| **{panel}** | | | |", *rows] if rows else []
    return "\n".join(lines) + "\n"


def _row(hint: Any, info: OptionInfo, default: Any) -> str:
    # Typer keeps the first spelling in `default` when an option is declared inside Annotated
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    spelling = "`, `".join(names)
    shown = "" if default is None or (hint is bool and not default) else f"`{'on' if default is True else default}`"
    return f"| `{spelling}` | {_value(hint, info)} | {shown} | {_cell(info.help or '')} |"


def _value(hint: Any, info: OptionInfo) -> str:
    """The choices, or text, int or float with the bounds."""
    parts = get_args(hint)
    if type(None) in parts and get_origin(hint) is not Literal:
        (hint,) = (part for part in parts if part is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if hint is bool:
        return ""
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", info.min), ("≤", info.max)) if bound is not None]
    return " ".join(["text" if hint is str else hint.__name__, ", ".join(bounds)]).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
