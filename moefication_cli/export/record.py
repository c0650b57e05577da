"""What an exported folder was made from and what its files hold, kept beside them as JSON; of a GGUF file too.

The same export again is then up to date, and a file that was edited since is found.
"""

from pathlib import Path
from typing import Any

from moefication_cli.errors import ConfigError, CorruptArtifactError
from moefication_cli.store import files, jsonio
from moefication_cli.store.manifest import check_file_name

RECORD = "moefication_export.json"
_SCHEMA = "moefication/export@1"
_KEYS = {"schema", "format", "model", "files", "seal"}


def write_record(folder: Path, to: str, model: str) -> None:
    """Record the files of a finished folder; `model` is the digest of the RUN/model it was made from.

    The card is left out: people write in it before they publish.
    """
    found = {name: entry for name, entry in files.described_folder(folder).items() if Path(name).name != "README.md"}
    record = {"schema": _SCHEMA, "format": to, "model": model, "files": found}
    jsonio.write(folder / RECORD, jsonio.sealed(record))


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any]:
    """Raises CorruptArtifactError for a record that cannot be read, was altered or is of another schema."""
    record = jsonio.read_object(folder / name)
    if record.get("schema") != _SCHEMA or not isinstance(record.get("files"), dict):
        raise CorruptArtifactError(f"{folder / name} is not a record of this version", "export again to another folder")
    if odd := sorted(record.keys() - _KEYS):
        raise CorruptArtifactError(f"{folder / name} has unknown key {odd[0]!r}", "export again to another folder")
    jsonio.check_seal(record, folder / name)
    for file, entry in record["files"].items():
        check_file_name(file, folder / name)
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "bytes"}:
            raise CorruptArtifactError(f"{folder / name} does not describe {file}", "export again to another folder")
    return record


def altered_files(folder: Path) -> list[str]:
    """Names of the files that are gone or do not hold what was written. Raises CorruptArtifactError."""
    listed = read_record(folder)["files"]
    return [name for name, entry in listed.items() if not files.is_as_described(folder / name, entry)]


def made_before(folder: Path, to: str, model: str) -> bool:
    """Whether `folder` holds this export already; False where nothing is in it.

    Raises ConfigError for a folder with other files in it, one of another export, and one that was edited since.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / RECORD).is_file():
        raise ConfigError(f"--out {folder} is there and not an empty folder", "name another folder")
    record = read_record(folder)
    if (record.get("format"), record.get("model")) != (to, model):
        raise ConfigError(f"--out {folder} holds another export", "name another folder, or delete this one")
    if altered := altered_files(folder):
        raise ConfigError(
            f"--out {folder} holds this export, but was edited since: {', '.join(altered)}",
            "name another folder, or delete this one",
        )
    return True


def file_record(file: Path) -> Path:
    """Where the record of an exported file is: beside it, because a folder may hold several."""
    return file.with_name(f"{file.name}.{RECORD}")


def write_file_record(file: Path, made: Path, to: str, model: str) -> None:
    """Record that `file` will hold what `made` holds; call it first, because a file without a record is refused."""
    record = {"schema": _SCHEMA, "format": to, "model": model, "files": {file.name: files.described(made)}}
    jsonio.write(file_record(file), jsonio.sealed(record))


def file_made_before(file: Path, to: str, model: str) -> bool:
    """Whether `file` is this export already; False where there is none.

    Raises ConfigError for a file without a record, one of another export, and one that was edited since.
    """
    if not file.exists():
        return False
    if not file_record(file).is_file():
        raise ConfigError(f"--out {file} is there already", "name another file or folder")
    record = read_record(file.parent, file_record(file).name)
    if (record.get("format"), record.get("model")) != (to, model):
        raise ConfigError(f"--out {file} is another export", "name another file or folder, or delete this one")
    entry = record["files"].get(file.name)
    if entry is None or not files.is_as_described(file, entry):
        raise ConfigError(f"--out {file} was edited since it was exported", "name another file, or delete this one")
    return True
