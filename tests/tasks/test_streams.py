"""--stream: the first rows of a hub dataset without downloading it, read once. The hub here is a local folder."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from cli_runner import Runner
from tiny_models import save_tiny

from moefication_cli.errors import ConfigError, MoEficationError
from moefication_cli.store.files import sha256
from moefication_cli.tasks.reading import data_digest, load_rows

CARD = """---
configs:
- config_name: first
  data_files: [{split: train, path: "first/train-*.csv"}, {split: validation, path: first/valid.csv}]
- config_name: second
  data_files: [{split: test, path: second/test.csv}]
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub with the dataset someone/reviews; returns the list of what is loaded from it, which grows."""
    root = tmp_path / "hub" / "someone" / "reviews"
    rows = {"first/train-0": 6, "first/train-1": 6, "first/valid": 4, "second/test": 3}
    for name, count in rows.items():
        (path := root / f"{name}.csv").parent.mkdir(parents=True, exist_ok=True)
        lines = [f'"w{(i * 7) % 40} w{i} of {name.replace("/", " ")}",{i % 2}' for i in range(count)]
        path.write_text("sentence,label\n" + "\n".join(lines) + "\n")
    (root / "README.md").write_text(CARD)
    loaded: list[Any] = []
    own = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **options: Any) -> Any:
        loaded.append((path, *args, options["streaming"]))
        return own(str(tmp_path / "hub" / path), *args, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return loaded


def texts(rows: Any) -> list[str]:
    return list(rows.dataset["sentence"])


def test_the_first_rows_are_read_once(hub: list[Any], tmp_path: Path) -> None:
    rows = load_rows("someone/reviews/first", stream=8)
    assert rows.num_rows == 8 and rows.text_fields == ("sentence",) and rows.label_field == "label"
    assert [text.partition(" of ")[2] for text in texts(rows)] == ["first train-0"] * 6 + ["first train-1"] * 2
    assert any("first 8 rows of split 'train'" in note for note in rows.notes)
    assert hub == [("someone/reviews", "first", True)]
    again = load_rows("someone/reviews/first", stream=8)
    assert texts(again) == texts(rows) and again.fingerprint == rows.fingerprint and len(hub) == 1
    assert [path.name[0] for path in (tmp_path / "cache" / "moefication-streams").iterdir()] != ["."]


def test_splits_and_how_many_rows_make_other_data(hub: list[Any]) -> None:
    found = {
        (config, split, rows): data_digest(f"someone/reviews/{config}", split, "calibrate", sha256, rows)
        for config, split, rows in (
            ("first", None, 2),
            ("first", None, 3),
            ("first", "validation", 2),
            ("second", None, 2),
        )
    }
    assert len(set(found.values())) == 4
    assert load_rows("someone/reviews/first", stream=50, split="validation").num_rows == 4  # all there are
    assert load_rows("someone/reviews/first", stream=50, purpose="evaluate").num_rows == 4
    assert load_rows("someone/reviews/second", stream=2).num_rows == 2
    with pytest.raises(ConfigError, match="no split 'dev'") as caught:
        load_rows("someone/reviews/first", stream=5, split="dev")
    assert "train, validation" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rows("someone/reviews/third", stream=5)


def test_a_stream_that_breaks_off_leaves_nothing(
    hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "save_to_disk", full)
        with pytest.raises(MoEficationError, match=r"cannot write .*moefication-streams.*No space") as caught:
            load_rows("someone/reviews/first", stream=5)
    assert "HF_DATASETS_CACHE" in str(caught.value.hint)
    assert not list((tmp_path / "cache" / "moefication-streams").iterdir())
    assert load_rows("someone/reviews/first", stream=5).num_rows == 5


def test_a_run_on_a_stream(hub: list[Any], tmp_path: Path, run_cli: Runner) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    save_tiny("bert", model)
    collect = ["collect-activations", run, "--model", model, "--data", "someone/reviews/first", "--stream"]
    run_cli.ok(*collect, 8)
    assert run_cli.ok(*collect, 8)["up_to_date"]
    assert not run_cli.ok(*collect, 9)["up_to_date"]
    local = run_cli(
        "collect-activations",
        tmp_path / "other",
        "--model",
        model,
        "--data",
        tmp_path / "hub/someone/reviews/first",
        "--stream",
        5,
    )
    assert local.code == 0 and "--stream 5 is ignored" in local.err
