"""Partitions that other programs made: what `gpmetis` writes, and the label files of MoEfication's published code.

gpmetis    `*layer_NNN*.part.N`: text, one part number per line
published  files named like the parameter that was split (`encoder.block.0.layer.1.DenseReluDense.wi.weight`) in folders such as
           `param_split`: a list of expert numbers, written by `torch.save`
           (https://github.com/thunlp/MoEfication, moefication/utils.py)

Shapes: `expert_F` int64 [F].
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.split.partition import check_divides

_EXPECTED = "gpmetis writes {name}.graph.part.N beside each exported graph, the published code one file named like each parameter"
# What lists of numpy's integers are made of. Files of older releases name it by the place it had there
_NUMBERS: list[Any] = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("int8", "int16", "int32", "int64", "uint8")},
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # type: ignore[attr-defined]
]


def find_partition_file(pattern: str, index: int, parameter: str) -> Path:
    """The file of one FFN in a folder, or among those that a pattern names. ConfigError unless there is exactly one.

    `parameter` is the name of its up-projection's weight.
    """
    folder, name = Path(pattern), f"layer_{index:03d}"
    if folder.is_dir():
        found = sorted(folder.glob(f"*{name}*.part.*")) or [p for p in folder.iterdir() if _same(p.name, parameter)]
    else:
        found = sorted(folder.parent.glob(folder.name))
    if len(found) > 1:
        found = [path for path in found if name in path.name or _same(path.name, parameter)]
    if len(found) != 1:
        raise ConfigError(
            f"--from-partition {pattern}: {len(found)} partition files for layer {index} ({parameter})",
            _EXPECTED.format(name=name),
        )
    if not found[0].is_file():  # reading a pipe or a device could wait for ever
        raise ConfigError(f"--from-partition {found[0]} is not a file", "name the files that hold the partition")
    return found[0]


def _same(file: str, parameter: str) -> bool:
    """Whether both name one parameter: a checkpoint may have been saved of the model's base, or of a wrapper around it."""
    return f".{file}".endswith(f".{parameter}") or f".{parameter}".endswith(f".{file}")


def read_partition_file(path: Path, num_neurons: int) -> tuple[Tensor, int]:
    """(expert_F, number of experts). Experts need not be equally large: see `metis.repair_balance`.

    Raises ConfigError for what is not one expert number per neuron, and where experts cannot be made equally large.
    """
    suffix = path.suffix.removeprefix(".")
    num_experts = int(suffix) if suffix.isdigit() else None
    try:
        if _is_saved(path):
            expert_F = _published(path, num_neurons)
        else:
            expert_F = parse_metis_partition(path.read_text(encoding="utf-8"), num_neurons, num_experts)
        num_experts = num_experts or int(expert_F.max()) + 1
        check_divides(num_neurons, num_experts)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is neither text nor what torch.save writes", "name a partition file") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from None
    return expert_F, num_experts


def _is_saved(path: Path) -> bool:
    """Whether torch.save wrote it: an archive, or a pickle from releases before 1.6."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _published(path: Path, num_neurons: int) -> Tensor:
    try:
        with torch.serialization.safe_globals(_NUMBERS):  # type: ignore[no-untyped-call]
            labels = torch.load(path, map_location="cpu", weights_only=True)
        expert_F = torch.as_tensor(np.asarray(labels))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError) as error:
        raise ConfigError(
            f"it holds more than a list of numbers, or is damaged, and is not read: {str(error).splitlines()[0]}",
            "save the labels again: torch.save([int(x) for x in labels], file)",
        ) from error
    if expert_F.is_floating_point() or expert_F.is_complex() or expert_F.shape != (num_neurons,):
        raise ConfigError(
            f"it holds {expert_F.dtype} {list(expert_F.shape)}, not one expert number for each of {num_neurons} neurons",
            "check that the file belongs to this layer and model",
        )
    if int(expert_F.min()) < 0:
        raise ConfigError(f"it names expert {int(expert_F.min())}", "experts are numbered from 0")
    return expert_F.to(torch.int64)


def parse_metis_partition(text: str, num_neurons: int, num_experts: int | None = None) -> Tensor:
    """`expert_F` int64 [F] from the text of a `gpmetis` `.part.N` file: one part number per line, one line a neuron.

    METIS allows parts of different sizes, so the result need not be balanced: pass it to `metis.repair_balance`,
    or to `Partition`, which refuses what is not. Raises ConfigError, naming the line, when a line is not a part
    number, a number is not below `num_experts` (where given), or the lines are not one per neuron.
    """
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    labels = []
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        if not (word.isascii() and word.isdigit()):
            raise ConfigError(
                f"line {number} of the partition file is {word[:40]!r}, not a part number",
                "pass the .part.N file that gpmetis wrote for this layer",
            )
        labels.append(int(word))
        if labels[-1] >= (num_experts if num_experts is not None else num_neurons):
            limit = f"{num_experts} experts" if num_experts is not None else f"{num_neurons} neurons"
            raise ConfigError(
                f"line {number} of the partition file names part {word[:40]}, too large for {limit}",
                "run gpmetis with the number of experts you ask for here",
            )
    if len(labels) != num_neurons:
        raise ConfigError(
            f"the partition file has {len(labels)} lines but the layer has {num_neurons} neurons",
            "check that the file belongs to this layer and model",
        )
    return torch.tensor(labels, dtype=torch.int64)
