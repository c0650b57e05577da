"""Which fields of a row are the text and the label, and which class a label is.

The guesses cover the GLUE names and the commonest others; a caller says them out loud. Pure functions.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moefication_cli.errors import ConfigError

_TEXT_FIELDS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
    ("content",),
)
_LABEL_FIELDS = ("label", "labels", "gold_label", "score", "similarity_score")
# Where a set of label names has an order everyone uses and the model does not say its own
_KNOWN_ORDERS = (("entailment", "neutral", "contradiction"), ("not_equivalent", "equivalent"), ("negative", "positive"))


def guess_fields(fields: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """(text fields, label field) by name; () and None where nothing fits."""
    text = next((names for names in _TEXT_FIELDS if set(names) <= set(fields)), ())
    if not text and len(fields) == 1:
        text = (fields[0],)
    return text, next((name for name in _LABEL_FIELDS if name in fields), None)


def split_fields(text_field: str, fields: Sequence[str]) -> tuple[str, ...]:
    """`a,b` as two fields, unless a field has that very name. ConfigError for more than two or none."""
    if text_field in fields:
        return (text_field,)
    names = tuple(name.strip() for name in text_field.split(",") if name.strip())
    if not 1 <= len(names) <= 2:
        raise ConfigError(f"--text-field {text_field!r} names {len(names)} fields", "name one field, or two as a,b")
    return names


def class_labels(
    values: Iterable[Any],
    names: Sequence[str],
    source: str,
    notes: list[str],
    dataset_names: Sequence[str] | None = None,
) -> npt.NDArray[np.int64]:
    """Class number of each label.

    `names` are the model's classes (or label words) in order. Labels match them by name (case, `-` and `_` apart), else
    by number; names the model does not know are put in their usual or sorted order if the model has only placeholders
    (`LABEL_0`), and `notes` says so. `dataset_names` are the names of a dataset with numbered classes.
    Raises ConfigError naming row (counted from 1) and value.
    """
    found = [_cleaned(value) for value in values]
    by_name = {_normal(name): i for i, name in enumerate(names)}
    if dataset_names is not None and {_normal(name) for name in dataset_names} <= set(by_name):
        found = [dataset_names[v] if isinstance(v, int) and 0 <= v < len(dataset_names) else v for v in found]
    distinct = dict.fromkeys(found)
    if any(isinstance(value, float) for value in distinct):
        raise ConfigError(
            f"{source}: labels are real numbers; regression is not supported", "name a --label-field of classes"
        )
    mapping = {value: _class_of(value, by_name, len(names)) for value in distinct}
    unknown = [value for value, number in mapping.items() if number is None]
    placeholders = all(_normal(name) == f"label_{i}" for i, name in enumerate(names))
    texts = [value for value in distinct if isinstance(value, str)]
    if unknown and placeholders and len(unknown) == len(texts) == len(distinct):
        order = _usual_order(texts, len(names))
        if order is not None:
            notes.append("label order (the model does not name its classes): " + ", ".join(order))
            mapping = {value: order.index(_normal(value)) for value in texts}
            unknown = []
    if unknown:
        row = found.index(unknown[0]) + 1
        raise ConfigError(
            f"{source}: row {row} has label {unknown[0]!r}, which is not one of {', '.join(map(repr, names))}"
            f" or 0 to {len(names) - 1}",
            "check --label-field, --split (test splits often have no labels) and the model's label2id",
        )
    return np.array([mapping[value] for value in found], np.int64)


def _cleaned(value: Any) -> int | float | str | None:
    if isinstance(value, bool | np.integer):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, int):
        return value
    return str(value).strip()


def _normal(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _class_of(value: int | float | str | None, by_name: dict[str, int], num_classes: int) -> int | None:
    if isinstance(value, str):
        if _normal(value) in by_name:
            return by_name[_normal(value)]
        try:
            value = float(value)
        except ValueError:
            return None
    if value is None or not float(value).is_integer():
        return None
    return int(value) if 0 <= value < num_classes else None


def _usual_order(texts: Sequence[str], num_classes: int) -> list[str] | None:
    """Names in class order, or None if that would be a guess without ground (not exactly one name per class)."""
    names = {_normal(text) for text in texts}
    for order in _KNOWN_ORDERS:
        if names <= set(order) and len(order) == num_classes:
            return list(order)
    return sorted(names) if len(names) == num_classes else None
