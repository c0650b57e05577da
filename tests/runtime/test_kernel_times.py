"""What is known of the kernels' times on this machine: measured once, kept, never believed when damaged; what `auto` makes of it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import convert
from experts import make, tokens
from tiny_models import tiny_inputs

from moefication_cli.errors import MoEficationError
from moefication_cli.models.loading import load
from moefication_cli.models.surgery import installed_layers
from moefication_cli.routing.router import TwoLayerRouter
from moefication_cli.routing.rules import Threshold
from moefication_cli.runtime import kernel_times
from moefication_cli.runtime.kernel_times import FFNKind, FFNTimes, KernelTimes
from moefication_cli.runtime.layer import MoEFFN
from moefication_cli.store import jsonio

KIND = FFNKind(16, 48, False, "relu", "float32", 2)
PLANTED = FFNTimes(dense=4.0, masked=5.0, few=1.0, many=3.0, router_flops=100)


def known(said: list[str] | None = None) -> KernelTimes:
    return KernelTimes([].append if said is None else said.append)


def planted(table: dict[tuple[int, int], FFNTimes], kind: FFNKind = KIND) -> KernelTimes:
    """Keeps {(size, tokens): times}."""
    times = known()
    for (size, count), found in table.items():
        times.keep(kind, size, count, found)
    return times


def test_time_between_the_measured_points_is_a_line_that_never_falls() -> None:
    assert PLANTED.experts(0.1) == pytest.approx(1.0) and PLANTED.experts(0.5) == pytest.approx(3.0)
    assert PLANTED.experts(0.3) == pytest.approx(2.0) and PLANTED.experts(0.7) == pytest.approx(4.0)
    assert PLANTED.experts(0.0) == pytest.approx(0.5)  # half of the least that was measured, whatever the line says
    noisy = replace(PLANTED, few=3.0, many=2.0)
    assert noisy.experts(0.5) == noisy.experts(0.1) == 3.0


def test_what_was_measured_is_kept_and_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = known(said).of(KIND, 8, 4)
    assert "experts of 8, 4 tokens" in said[0]
    assert first.dense > 0 and first.router_flops == 16 * (16 + 6)
    monkeypatch.setattr(kernel_times, "measure", lambda *asked: pytest.fail("measured again"))
    assert known(said).of(KIND, 8, 4) == first
    assert known().known(KIND, 4, 4) is None and known().known(KIND, 8, 1) is None
    assert (
        known().known(replace(KIND, layers=3), 8, 4) is None
        and known().known(replace(KIND, dtype="bfloat16"), 8, 4) is None
    )
    monkeypatch.setattr(kernel_times, "measure", lambda *asked: (PLANTED, 1.1))
    said.clear()
    assert known(said).of(KIND, 8, 4, anew=True) == PLANTED == known().known(KIND, 8, 4)
    assert len(said) == 1
    monkeypatch.setattr(kernel_times, "measure", lambda *asked: (PLANTED, 30.0))
    known(said).of(KIND, 8, 4, anew=True)
    assert "30.0 times their least" in said[-1] and "busy" in said[-1]


def test_another_number_of_threads_has_a_file_of_its_own() -> None:
    path = planted({(8, 1): PLANTED}).path
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert known().path != path and known().known(KIND, 8, 1) is None
    finally:
        torch.set_num_threads(before)
    assert known().known(KIND, 8, 1) == PLANTED


def _resealed(change: Any) -> Any:
    def altered(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return jsonio.canonical(jsonio.sealed(content), indent=2) + b"\n"

    return altered


def _set_entry(name: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["ffns"][KIND.key]["1"]["8"][name] = value

    return _resealed(change)


DAMAGE = {
    "cut short": (lambda data: data[:-40], "cannot be used"),
    "no JSON": (lambda data: b"\xff\x00", "cannot be used"),
    "a digit changed": (lambda data: data.replace(b"4.0", b"9.0"), "cannot be used"),
    "another machine": (_resealed(lambda c: c["machine"].update(processor="abacus")), "not of this machine"),
    "another schema": (_resealed(lambda c: c.update(schema="moefication/ffn-times@9")), "not of this machine"),
    "no seal": (
        lambda data: jsonio.canonical({k: v for k, v in json.loads(data).items() if k != "seal"}),
        "not of this",
    ),
    "negative": (_set_entry("masked", -1.0), "cannot be used"),
    "text": (_set_entry("dense", "fast"), "cannot be used"),
    "another field": (_set_entry("slow", 1.0), "cannot be used"),
    "no tables": (_resealed(lambda c: c.update(ffns=[1])), "cannot be used"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_said_and_measured_anew(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alter, word = DAMAGE[damage]
    path = planted({(8, 1): PLANTED}).path
    path.write_bytes(alter(path.read_bytes()))
    said: list[str] = []
    times = known(said)
    assert len(said) == 1 and word in said[0] and "anew" in said[0]
    assert times.known(KIND, 8, 1) is None
    other = replace(PLANTED, dense=7.0)
    monkeypatch.setattr(kernel_times, "measure", lambda *asked: (other, 1.0))
    assert times.of(KIND, 8, 1) == other
    assert known(later := []).known(KIND, 8, 1) == other and not later


def test_a_folder_that_cannot_be_written_is_said() -> None:
    own_folder = known().path.parent
    own_folder.write_text("a file where the folder should be")
    said: list[str] = []
    times = known(said)
    times.keep(KIND, 8, 1, PLANTED)
    assert len(said) == 1 and "times are not kept" in said[0]
    assert times.known(KIND, 8, 1) == PLANTED and own_folder.is_file()
    with pytest.raises(MoEficationError):  # what is caught above
        jsonio.write(times.path, {})


def test_from_how_many_tokens_on_masking_is_faster() -> None:
    slow, fast = PLANTED, replace(PLANTED, masked=0.8)
    level = replace(PLANTED, masked=0.95)  # within what measurements vary by
    for one, some, many, expected in (
        (slow, slow, fast, 512), (slow, fast, fast, 64), (fast, fast, fast, 1), (fast, slow, fast, 512),
        (fast, fast, slow, None), (slow, slow, level, None),
    ):  # fmt: skip
        times = planted({(8, 1): one, (8, 64): some, (8, 512): many})
        assert times.masked_from(KIND, 8, 0.1) == expected
    assert times.masked_from(KIND, 4, 0.1) is None
    assert times.masked_from(KIND, 8, 0.5) == 512  # half of the neurons take three times as long as a tenth


@pytest.mark.parametrize("select", [False, True])
def test_masked_calls_are_the_same_mixture(select: bool) -> None:
    weights = make(fix=True)
    router = TwoLayerRouter(torch.randn(12, 32, generator=torch.Generator().manual_seed(5)))
    x_TD = tokens(9, weights)
    plain = MoEFFN(weights, router, Threshold(0.5))
    layer = MoEFFN(weights, router, Threshold(0.5), masked_from=8)
    if select:
        for each in (plain, layer):
            each.select = lambda x_TD, weights: router.scores(x_TD) >= 0.5
    mask_T = torch.arange(9) != 2
    with torch.inference_mode():
        for count, path in ((7, "numba"), (9, "reference"), (8, "reference"), (3, "numba")):
            found = layer(x_TD[:count])
            assert layer.last_backend == path, count
            torch.testing.assert_close(found, plain(x_TD[:count]), rtol=1e-4, atol=1e-5)
        padded = layer(x_TD, mask_T)
        torch.testing.assert_close(padded, plain(x_TD, mask_T), rtol=1e-4, atol=1e-5)
        assert not bool(padded[2].any()) and not torch.allclose(padded, weights.ffn.forward(x_TD))
    assert plain.last_backend == "numba"


def test_load_goes_by_what_was_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert("opt", tmp_path / "moe", top_k=2, extra=True)
    inputs = tiny_inputs("opt")

    def run(**options: Any) -> tuple[torch.Tensor, set[str]]:
        model = load(tmp_path / "moe", **options)
        with torch.inference_mode():
            logits = model(**inputs).logits
        return logits, {layer.last_backend for layer in installed_layers(model).values()}

    plain, paths = run()
    assert paths == {"numba"} and not caplog.records
    kind = next(iter(load(tmp_path / "moe").moefication.kinds(torch.float32).values()))
    assert (kind.d_model, kind.num_neurons, kind.layers) == (16, 48, 2)
    fast = replace(PLANTED, masked=0.1)
    planted({(8, count): fast for count in kernel_times.TOKENS}, kind)
    masked, paths = run()
    assert paths == {"reference"} and "the same mixture" in caplog.text
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(masked[real], plain[real], rtol=1e-4, atol=1e-5)
    assert run(backend="numba")[1] == {"numba"} and run(dtype=torch.float64)[1] == {"torch"}  # asked for; not measured
    planted({(8, count): PLANTED for count in kernel_times.TOKENS}, kind)
    assert run()[1] == {"numba"}
    assert MoEFFN(make(), TwoLayerRouter(torch.zeros(12, 32)), Threshold(0.0)).masked_from == sys.maxsize
