"""`verify` and what is written beside the files: run.json and an export's record, bit by bit and key by key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner

from moefication_cli.export.record import RECORD, write_record
from moefication_cli.store import jsonio
from moefication_cli.store.rundir import RunDir


@pytest.fixture
def records(tmp_path: Path) -> list[Path]:
    """run.json of a run without stages, and the record of an export."""
    known = {
        "task": "classification",
        "prompt": "{text} é",
        "label_words": "x,y",
        "fields": {"text": "a", "label": "b"},
    }
    RunDir(tmp_path / "run").remember(model="org/model", revision="a" * 40, fingerprint="b" * 64, **known)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    write_record(tmp_path / "out", "mixtral", "c" * 64)
    return [tmp_path / "run" / "run.json", tmp_path / "out" / RECORD]


def test_one_bit_of_a_record(records: list[Path], run_cli: Runner) -> None:
    for path in records:
        data = path.read_bytes()
        assert run_cli("verify", path.parent).code == 0
        for at in range(0, len(data), 29):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            assert run_cli("verify", path.parent).code == 4, (path.name, at, data[max(0, at - 10) : at + 10])
        path.write_bytes(data)


def test_keys_that_are_there_twice_unknown_or_of_a_newer_version(records: list[Path], run_cli: Runner) -> None:
    edits: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
        lambda value: value | {"else": 1},
        lambda value: value | {"schema": value["schema"].replace("@1", "@2")},
        lambda value: value | {"model": "other"},
    ]
    for path in records:
        text = path.read_text()
        value = json.loads(text)
        altered = [text.replace('{\n  "', '{\n  "model": "x",\n  "', 1), text.replace('"seal"', '"sea1"')]
        altered += [json.dumps(edit(value), indent=2, sort_keys=True) + "\n" for edit in edits]
        altered += [json.dumps(jsonio.sealed(edit(value)), indent=2, sort_keys=True) + "\n" for edit in edits[:2]]
        for one in altered:
            path.write_text(one)
            assert run_cli("verify", path.parent).code == 4, one
        path.write_text(text)
        assert run_cli("verify", path.parent).code == 0


@pytest.mark.parametrize("name", ["../run/run.json", "/etc/passwd", "a/../../x"])
def test_a_record_cannot_name_files_outside(name: str, records: list[Path], run_cli: Runner) -> None:
    _, record = records
    value = json.loads(record.read_text())
    value["files"][name] = value["files"]["config.json"]
    jsonio.write(record, jsonio.sealed(value))
    found = run_cli("verify", record.parent)
    assert found.code == 4 and "outside its folder" in found.err


def test_records_of_earlier_versions_have_no_seal(records: list[Path], run_cli: Runner) -> None:
    for path in records:
        value = json.loads(path.read_text())
        del value["seal"]
        jsonio.write(path, value)
        assert run_cli("verify", path.parent).code == 0


def test_an_edited_run_json_is_read_by_stages_and_named_by_verify(records: list[Path], run_cli: Runner) -> None:
    path, _ = records
    value = json.loads(path.read_text())
    jsonio.write(path, value | {"model": "elsewhere/model"})
    assert RunDir(path.parent).info.model == "elsewhere/model"
    assert run_cli("verify", path.parent).code == 4
    RunDir(path.parent).remember(task="text2text")  # the next command that writes it makes it whole
    assert run_cli("verify", path.parent).code == 0
