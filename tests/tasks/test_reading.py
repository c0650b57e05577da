"""Data files and labels as rows."""

import json
import subprocess
import sys

import numpy as np
import pytest

from moefication_cli.errors import ConfigError
from moefication_cli.tasks.fields import class_labels
from moefication_cli.tasks.reading import load_rows


def test_tsv_keeps_quotes_and_words_that_look_missing(sst2):
    rows = load_rows(sst2)
    assert rows.num_rows == 7 and rows.text_fields == ("sentence",) and rows.label_field == "label"
    assert [text for (text,) in rows.take(["sentence"], np.array([6, 2, 5]))] == ["NA", '"the film ', "null"]
    assert any("'sentence'" in note for note in rows.notes)


def test_no_header_takes_column_numbers(tmp_path):
    path = tmp_path / "cola.tsv"
    path.write_text('gj04\t1\t\tHe said "go.\ngj04\t0\t*\tGo he.\n')
    rows = load_rows(path, header=False, text_field="3", label_field="1")
    assert rows.num_rows == 2 and rows.fields == ["0", "1", "2", "3"]
    assert rows.take(["3", "1"], np.array([0])) == [('He said "go.', "1")]
    with pytest.raises(ConfigError, match="no field '3'") as caught:
        load_rows(path, text_field="3")
    assert "--no-header" in caught.value.hint
    with pytest.raises(ConfigError, match="looks like the text"):
        load_rows(path).require_text()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_formats(tmp_path, suffix):
    items = [
        {"premise": 'a "b", c', "hypothesis": "d", "label": "x"},
        {"premise": "e", "hypothesis": "f", "label": "y"},
    ]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        path.write_text('premise,hypothesis,label\n"a ""b"", c",d,x\ne,f,y\n')
    elif suffix == "parquet":
        import datasets

        datasets.Dataset.from_list(items).to_parquet(str(path))
    else:
        path.write_text("\n".join(map(json.dumps, items)) if suffix == "jsonl" else json.dumps(items))
    rows = load_rows(path)
    assert rows.text_fields == ("premise", "hypothesis") and rows.label_field == "label"
    assert rows.take(["premise", "hypothesis", "label"], np.arange(2)) == [tuple(item.values()) for item in items]


def test_folder_takes_the_split_that_fits_the_purpose(sst2):
    (sst2.parent / "train.tsv").write_text("sentence\tlabel\ngood\t1\n")
    assert load_rows(sst2.parent).num_rows == 1
    assert load_rows(sst2.parent, purpose="evaluate").num_rows == 7
    assert load_rows(sst2.parent, split="validation").files == (sst2,)
    with pytest.raises(ConfigError, match="no file of split 'test'"):
        load_rows(sst2.parent, split="test")


def test_bad_data_is_one_sentence(tmp_path, sst2, capfd):
    def refused(name, match, content=None, **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=match):
            load_rows(path, **options)

    refused("missing.tsv", "not found")
    refused("empty.tsv", "is empty", b"")
    refused("header.tsv", "is empty", b"sentence\tlabel\n")
    refused("wide.tsv", "names 2 columns, the next line has 3", b"sentence\tlabel\na\tb\t1\n")
    refused("ragged.tsv", "cannot be read", b"sentence\tlabel\na\t1\nb\t1\t2\n")
    refused("bytes.tsv", "cannot be read", b"sentence\tlabel\n\xff\xfe\t1\n")
    refused("broken.jsonl", "cannot be read", b'{"text": "a"}\n{"text": \n')
    refused("torn.parquet", "cannot be read", b"PAR1 and then nothing")
    refused("rows.xlsx", "unknown kind", b"x")
    refused("numbers.jsonl", "holds int64, not text", b'{"text": 3}\n')
    refused("sst2/dev.tsv", "no field 'sentense'", text_field="sentense")
    refused("sst2/dev.tsv", "no label field 'y'", label_field="y")
    with pytest.raises(ConfigError, match="names 3 fields"):
        load_rows(sst2, text_field="a,b,c")
    assert capfd.readouterr() == ("", "")


def test_unreachable_hub_is_an_error_at_once(monkeypatch):
    import socket

    def no_network(*_args, **_options):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(ConfigError, match="hub cannot be reached"):
        load_rows("glue/no_such_configuration")


def test_labels_by_name_number_and_usual_order():
    notes = []
    assert class_labels(["Positive", "negative "], ["negative", "positive"], "d", notes).tolist() == [1, 0]
    assert class_labels(["1", "0"], ["negative", "positive"], "d", notes).tolist() == [1, 0]
    assert class_labels([True, 0.0], ["negative", "positive"], "d", notes).tolist() == [1, 0]
    # classes of the dataset in another order than the model's: names win over numbers
    assert class_labels([0, 1], ["b", "a"], "d", notes, dataset_names=["a", "b"]).tolist() == [1, 0]
    assert notes == []
    generic = ["LABEL_0", "LABEL_1", "LABEL_2"]
    found = class_labels(["neutral", "entailment", "contradiction"], generic, "d", notes)
    assert found.tolist() == [1, 0, 2] and "entailment, neutral, contradiction" in notes[0]
    assert class_labels(["z", "x", "y"], generic, "d", notes).tolist() == [2, 0, 1]


@pytest.mark.parametrize("labels", [["0", "2"], ["0", "-1"], ["negative", "meh"], ["0", ""], [0, None], ["LABEL", "0"]])
def test_label_outside_the_set_names_row_and_value(labels):
    outside = next(i for i, value in enumerate(labels) if value not in ("0", 0, "negative"))
    with pytest.raises(ConfigError, match=rf"row {outside + 1} has label {labels[outside]!r}"):
        class_labels(labels, ["negative", "positive"], "d", [])
    with pytest.raises(ConfigError, match="regression"):
        class_labels([0.5], ["negative", "positive"], "d", [])


def test_nothing_stays_in_the_temporary_folder(sst2, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    rows = load_rows(sst2)
    assert list(folder.iterdir()) == []  # a process that is killed now leaves nothing
    assert rows.take(["sentence"], np.array([6])) == [("NA",)]


def test_a_full_temporary_folder_is_not_blamed_on_the_data(sst2):
    code = """
import resource, sys
from moefication_cli.errors import ConfigError, MoEficationError
from moefication_cli.tasks.reading import load_rows
assert load_rows(sys.argv[1]).num_rows == 7
resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
try:
    load_rows(sys.argv[1])
except MoEficationError as error:
    assert not isinstance(error, ConfigError)
    sys.exit(f"{error.exit_code} {error.message} {error.hint}")
"""
    done = subprocess.run([sys.executable, "-c", code, str(sst2)], capture_output=True, text=True, check=False)
    assert "1 nothing can be written to the temporary folder" in done.stderr
    assert "TMPDIR" in done.stderr
