"""Exit codes, messages and JSON of the command line; every bad input a user can give."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cli_runner import Runner
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from moefication_cli import config
from moefication_cli.cli.console import Console
from moefication_cli.errors import MoEficationError
from moefication_cli.runtime.backends import BACKENDS


def contents(folder: object) -> dict[str, bytes]:
    """Every file below, locks and the cache of hashes apart."""
    files = [p for p in Path(str(folder)).rglob("*") if p.is_file() and not {".locks", ".cache"} & set(p.parts)]
    return {str(path): path.read_bytes() for path in files}


def fails(run_cli: Runner, code: int, *words: object) -> str:
    """The command fails with this code, one JSON object on stdout, a message on stderr; returns message and hint.

    What follows the command (a run directory) is left as it was.
    """
    before = contents(words[1]) if len(words) > 1 else {}
    outcome = run_cli(*words, "--json")
    assert before == (contents(words[1]) if len(words) > 1 else {})
    assert outcome.code == code, (outcome.code, outcome.err)
    error = outcome.json["error"]
    assert outcome.json["ok"] is False
    assert error["exit_code"] == code
    assert "error: " in outcome.err
    assert "Traceback" not in outcome.err
    return f"{error['message']} {error['hint']}"


def test_missing_model_and_data(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "nowhere" in fails(run_cli, 2, "collect-activations", run, "--model", tmp_path / "nowhere", "--data", data)
    assert "--model" in fails(run_cli, 2, "split", run)
    assert "none.tsv" in fails(run_cli, 2, "collect-activations", run, "--model", bert, "--data", tmp_path / "none.tsv")
    assert not (run / "activations").exists()


def test_wrong_fields_empty_data_and_labels(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    collect = ["collect-activations", run, "--model", bert]
    message = fails(run_cli, 2, *collect, "--data", data, "--text-field", "phrase")
    assert "phrase" in message and "sentence" in message
    empty = tmp_path / "empty.tsv"
    empty.write_text("sentence\tlabel\n")
    fails(run_cli, 2, *collect, "--data", empty)
    blank = tmp_path / "blank.tsv"
    blank.write_text("sentence\tlabel\n \t1\n")
    fails(run_cli, 2, *collect, "--data", blank)
    run_cli.ok(*collect, "--data", data)
    run_cli.ok("split", run, "--method", "random", "--num-experts", 6)
    run_cli.ok("train-router", run, "--router", "similarity")
    odd = tmp_path / "odd.tsv"
    odd.write_text("sentence\tlabel\nw1 w2\t7\n")
    assert "7" in fails(run_cli, 2, "eval", run, "--data", odd)
    fails(run_cli, 2, "eval", run)  # no data
    assert "magic" in fails(run_cli, 2, "eval", run, "--data", data, "--selection", "magic")
    fails(run_cli, 2, "eval", run, "--data", data, "--fractions", "0.2,1.5")
    fails(run_cli, 2, "eval", run, "--data", data, "--backend", "magic")


def test_a_failing_command_does_not_change_the_model_of_a_run(run_cli: Runner, bert: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run_cli.ok("split", run, "--model", bert, "--method", "random", "--num-experts", 6)
    save_tiny("llama", other)
    fails(run_cli, 2, "split", run, "--model", other, "--method", "random", "--num-experts", 7)
    fails(run_cli, 2, "collect-activations", run, "--model", other, "--data", tmp_path / "none.txt")
    assert run_cli.ok("split", run, "--method", "random", "--num-experts", 6)["up_to_date"]
    run_cli.ok("split", run, "--model", other, "--method", "random", "--num-experts", 6)
    assert json.loads((run / "run.json").read_text())["model"] == str(other)


def test_numbers_that_do_not_fit_the_storage(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    weights["bert.encoder.layer.0.attention.output.LayerNorm.bias"] += 1e6
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    message = fails(run_cli, 1, "collect-activations", tmp_path / "run", "--model", bert, "--data", data)
    assert "layer 0 (encoder.layer.0)" in message and "--storage-dtype bfloat16" in message


def test_stages_without_a_run_name_the_first_command(run_cli: Runner, tmp_path: Path) -> None:
    for command in ("build-graph", "train-router", "apply", "eval"):
        message = fails(run_cli, 3, command, tmp_path / "run", *(["--data", "x.tsv"] if command == "eval" else []))
        assert "collect-activations" in message
    assert not (tmp_path / "run").exists()


def test_experts_that_do_not_divide(run_cli: Runner, bert: Path, tmp_path: Path) -> None:
    message = fails(run_cli, 2, "split", tmp_path / "run", "--model", bert, "--method", "random", "--num-experts", 7)
    assert "1, 2, 3, 4, 6, 8, 12, 16, 24, 48" in message
    fails(run_cli, 2, "split", tmp_path / "run", "--model", bert, "--method", "random", "--expert-size", 5)
    fails(run_cli, 2, "split", tmp_path / "run", "--model", bert, "--num-experts", 6, "--expert-size", 8)


def test_more_experts_than_there_are(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_cli.ok("collect-activations", run, "--model", bert, "--data", data)
    run_cli.ok("split", run, "--method", "random", "--num-experts", 6)
    run_cli.ok("train-router", run, "--router", "similarity")
    assert "6 experts" in fails(run_cli, 2, "apply", run, "--top-k", 7)
    assert "does not pay" in fails(run_cli, 2, "apply", run, "--fraction", 0.01)
    fails(run_cli, 2, "apply", run, "--fraction", 1.5)
    assert not (run / "model").exists()


def test_missing_and_stale_upstream_name_the_next_command(
    run_cli: Runner, bert: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_cli.ok("split", run, "--model", bert, "--method", "random", "--num-experts", 6)
    assert "collect-activations" in fails(run_cli, 3, "train-router", run)
    assert "train-router" in fails(run_cli, 3, "apply", run)
    assert "build-graph" in fails(run_cli, 3, "split", run, "--method", "graph", "--num-experts", 6)


def test_altered_and_truncated_artifacts(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_cli.ok("collect-activations", run, "--model", bert, "--data", data)
    run_cli.ok("split", run, "--method", "random", "--num-experts", 6)
    layer = run / "split" / "layer_001.safetensors"
    good = layer.read_bytes()
    layer.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "layer_001" in fails(run_cli, 4, "train-router", run)
    layer.write_bytes(good[:-8])
    assert "layer_001" in fails(run_cli, 4, "train-router", run)
    layer.write_bytes(good)
    manifest = run / "split" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{", '{"stage": "x", ', 1))
    fails(run_cli, 4, "train-router", run)


def test_activations_that_are_not_finite(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    weights["bert.encoder.layer.1.intermediate.dense.weight"][0, 0] = float("nan")
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    message = fails(run_cli, 1, "collect-activations", run, "--model", bert, "--data", data)
    assert "layer 1 (encoder.layer.1)" in message
    assert not (run / "activations").exists()


def test_a_pickle_with_code_is_refused(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    (bert / "model.safetensors").unlink()
    torch.save({"x": Evil()}, bert / "pytorch_model.bin")
    fails(run_cli, 2, "collect-activations", tmp_path / "run", "--model", bert, "--data", data)
    assert not (tmp_path / "executed").exists()


def test_unknown_architecture(run_cli: Runner, bert: Path, tmp_path: Path) -> None:
    values = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(values | {"model_type": "nonesuch", "architectures": ["Nonesuch"]}))
    assert "nonesuch" in fails(run_cli, 2, "inspect", bert)
    fails(run_cli, 2, "split", tmp_path / "run", "--model", bert, "--method", "random", "--num-experts", 6)


def test_an_ffn_nobody_knows_says_how_to_describe_it(run_cli: Runner, tmp_path: Path) -> None:
    import transformers

    config = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=48)
    transformers.XLNetLMHeadModel(config).save_pretrained(tmp_path / "xlnet")
    message = fails(run_cli, 2, "inspect", tmp_path / "xlnet")
    assert "--ffn" in message and "XLNet" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(run_cli: Runner, bert: Path, tmp_path: Path) -> None:
    message = fails(run_cli, 2, "split", tmp_path / "run", "--model", bert, "--device", "cuda")
    assert "CUDA" in message


def test_usage_errors(run_cli: Runner, bert: Path, tmp_path: Path) -> None:
    fails(run_cli, 2, "split", tmp_path / "run", "--nope")
    fails(run_cli, 2, "split", tmp_path / "run", "--method", "magic")
    fails(
        run_cli,
        2,
        "split",
        tmp_path / "run",
        "--model",
        bert,
        "--num-experts",
        6,
        "--layers",
        "0,9",
        "--method",
        "random",
    )
    fails(run_cli, 2, "nonesuch")


def test_precedence_command_line_environment_file(
    run_cli: Runner, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[split]\nmethod = "random"\nnum-experts = 6\n')
    options = ["--model", bert, "--config", file]

    def experts(run: str, *more: object) -> tuple[int, str]:
        run_cli.ok("split", tmp_path / run, *options, *more)
        entry = json.loads((tmp_path / run / "split" / "manifest.json").read_text())["config"]["num_experts"]
        return entry["value"], entry["source"]

    assert experts("a") == (6, "config file")
    monkeypatch.setenv("MOEFICATION_NUM_EXPERTS", "8")
    assert experts("b") == (8, "environment")
    assert experts("c", "--num-experts", 12) == (12, "command line")
    file.write_text("[split]\nexperts = 6\n")
    assert "experts" in fails(run_cli, 2, "split", tmp_path / "d", *options)


def test_dry_run_writes_nothing(run_cli: Runner, bert: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = run_cli.ok("collect-activations", run, "--model", bert, "--data", data, "--dry-run")
    assert found["dry_run"]
    assert not run.exists()


def test_defaults_are_written_once() -> None:
    for name, value in vars(config).items():
        if isinstance(value, type) and name.endswith("Config"):
            instance = value()
            for entry in config.options_of(value):
                assert getattr(instance, entry.name) == entry.default
                assert entry.metadata["help"]


def test_backend_names_are_documented() -> None:
    assert {"reference", "torch", "grouped", "numba", "triton", "fastmoe", "dense"} == set(BACKENDS)
    assert set(get_args(config.TaskName)) == {"classification", "text2text", "lm", "mlm", "embedding"}


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_run_that_resumes(
    number: signal.Signals, code: int, run_cli: Runner, bert: Path, tmp_path: Path
) -> None:
    data = tmp_path / "long.tsv"
    data.write_text(
        "sentence\tlabel\n" + "".join(f"w{i % 50} w{i % 31} w{i % 17} w3 w4 w5\t{i % 2}\n" for i in range(60000))
    )
    run = tmp_path / "run"
    words = ["collect-activations", run, "--model", bert, "--data", data, "--batch-size", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moefication_cli", *map(str, words)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: (run / ".activations.partial").exists())
    time.sleep(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert not (run / "activations").exists()
    # No lock is left behind.
    run_cli.ok("split", run, "--model", bert, "--method", "random", "--num-experts", 6)


def test_messages_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("reads \x1b[31mred\x07\nand lines")
    console.error(MoEficationError("no \x1b]0;title\x07", "run \x9b2J"))
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\x07" not in said and "\x9b" not in said
    assert "reads \\x1b[31mred\\x07\nand lines" in said
