"""eval --lm-eval: dense and converted on a local task, beside the harness run directly on the dense folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Runner

from moefication_cli.evaluation import harness
from moefication_cli.store.rundir import RunDir

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`local_task(questions)` -> a folder with the task `local_words`; data are cached below the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def make(questions: list[dict[str, Any]]) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        (folder / "words.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
        (folder / "words.yaml").write_text(TASK.format(name="local_words", data=folder / "words.jsonl"))
        return folder

    return make


def questions(vocabulary: list[str], count: int) -> list[dict[str, Any]]:
    size = len(vocabulary)
    return [
        {
            "question": " ".join(vocabulary[(i * k + 3) % size] for k in range(1, 6)),
            "choices": [vocabulary[(i * 5 + c) % size] for c in range(4)],
            "gold": i % 4,
        }
        for i in range(count)
    ]


def direct(folder: Path, tasks: Path, model: Any = None) -> dict[str, float]:
    """The harness by itself, as its own documentation runs it."""
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if model is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    wrapped = HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(wrapped, tasks=["local_words"], task_manager=manager, bootstrap_iters=0)
    return {name: found["results"]["local_words"][f"{name},none"] for name in ("acc", "acc_norm")}


def test_dense_and_converted_in_one_table(
    calibrated_run: tuple[Path, Path], local_task: Any, run_cli: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moefication_cli

    run, model = calibrated_run
    tasks = local_task(questions([f"w{i}" for i in range(40)], 60))
    run_cli.ok("apply", run, "--fraction", 0.5, "--rule", "top_k", "--compensation", "none")
    words = ("eval", run, "--lm-eval", "local_words", "--include-path", tasks)
    found = run_cli.ok(*words)
    assert [(row["task"], row["metric"], row["examples"]) for row in found["rows"]] == [
        ("local_words", "acc", 60), ("local_words", "acc_norm", 60)
    ]  # fmt: skip
    dense, moe = direct(model, tasks), direct(model, tasks, moefication_cli.load(run / "model"))
    for row in found["rows"]:
        assert (row["dense"], row["moe"]) == (dense[row["metric"]], moe[row["metric"]])
    assert dense != moe  # the control: the two rows are two models
    assert RunDir(run).names("harness") == ["default"] and RunDir(run).names("eval") == []
    assert run_cli.ok(*words)["up_to_date"] is True
    stages = {row["stage"]: row["state"] for row in run_cli.ok("status", run)["rows"]}
    assert stages["harness/default"] == "current"
    with (tasks / "words.yaml").open("a") as file:
        file.write("num_fewshot: 0\n")
    assert run_cli.ok(*words, "--limit", 10)["rows"][0]["examples"] == 10

    unknown = run_cli("eval", run, "--lm-eval", "local_words", "--include-path", run / "none")
    assert unknown.code == 2 and "is not a folder" in unknown.err
    (tasks / "words.jsonl").unlink()
    gone = run_cli(*words)
    assert gone.code == 2 and "lm-evaluation-harness:" in gone.err
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    missing = run_cli(*words)
    assert missing.code == 2 and "pip install 'moefication[eval]'" in missing.err


def test_a_trained_model(shared_dir: Path, tmp_path: Path, local_task: Any, run_cli: Runner) -> None:
    model, data = shared_dir / "models" / "opt-relu-wikitext2", shared_dir / "data" / "wikitext2" / "wiki.valid.txt"
    tasks = local_task(questions("the of and in to was a is on for as with by he at from his it an".split(), 40))
    run = tmp_path / "run"
    run_cli.ok("run", run, "--model", model, "--data", data, "--max-tokens", 2048, "--fraction", 0.1, "--refine", 0)
    rows = run_cli.ok("eval", run, "--lm-eval", "local_words", "--include-path", tasks)["rows"]
    assert {row["metric"]: row["dense"] for row in rows} == direct(model, tasks)
    assert all(abs(row["difference"]) < 0.5 for row in rows)
