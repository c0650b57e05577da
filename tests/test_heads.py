"""Which task can convert which model, and how `inspect`, `collect-activations` and `run` say it."""

import pytest
import transformers
from tiny_models import TINY, save_tiny

from moefication_cli.errors import ConfigError, UnsupportedModelError
from moefication_cli.models.heads import checked_task, task_of


def named(config, architecture):
    config.architectures = [architecture]
    return config


def test_the_task_of_a_model():
    tasks = {
        "bert": "classification",
        "t5": "text2text",
        "opt": "lm",
        "gpt2": "lm",
        "bert-bare": "embedding",
        "vit": None,
    }
    tasks |= {"bert-mlm": "mlm", "roberta-mlm": "mlm"}
    for name, task in {**tasks, "bart": "text2text", "bart-classifier": "classification"}.items():
        kind, config = TINY[name]
        assert task_of(named(config(), kind)) == task, name
    assert task_of(transformers.BertConfig()) is None
    own = named(transformers.LlamaConfig(auto_map={"AutoModelForCausalLM": "modeling.MyLM"}), "MyLM")
    assert task_of(own) == "lm"
    whisper = named(transformers.WhisperConfig(), "WhisperForConditionalGeneration")
    for config, reason in [
        (whisper, "reads input_features"),
        (named(transformers.ViTConfig(), "ViTForImageClassification"), "reads pixel_values"),
        (named(transformers.BertConfig(), "BertForTokenClassification"), "has no head"),
        (named(transformers.LlamaConfig(), "LlamaModel"), "is no encoder"),
        (named(transformers.T5Config(), "T5Model"), "is no encoder"),
        (named(transformers.BertConfig(is_decoder=True), "BertModel"), "is no encoder"),
        (transformers.BertConfig(), "names no architecture"),
    ]:
        for asked in (None, "lm"):
            with pytest.raises(UnsupportedModelError, match=f"the-model cannot be converted.*{reason}"):
                checked_task(config, asked, "the-model")
    bert = named(transformers.BertConfig(), "BertForSequenceClassification")
    assert checked_task(bert, None, "x") == checked_task(bert, "classification", "x") == "classification"
    with pytest.raises(ConfigError, match=r"--task lm does not fit.*--task classification"):
        checked_task(bert, "lm", "x")


def test_inspect_names_the_task_and_run_refuses_models_without_one(tmp_path, run_cli):
    save_tiny("bert", tmp_path / "bert")
    found = run_cli.ok("inspect", tmp_path / "bert")
    assert found["task"] == "classification"
    assert "--task classification" in run_cli("inspect", tmp_path / "bert").out
    data = tmp_path / "data.tsv"
    data.write_text("sentence\tlabel\nw1 w2\t0\nw3 w4\t1\n")
    vit = tmp_path / "vit"
    save_tiny("vit", vit)
    assert run_cli.ok("inspect", vit)["task"] is None
    assert "reads pixel_values" in run_cli("inspect", vit).out
    for command in ("run", "collect-activations"):
        for task in ([], ["--task", "lm"], ["--dry-run"]):
            refused = run_cli(command, tmp_path / "run", "--model", vit, "--data", data, *task, "--json")
            assert refused.code == 2 and "reads pixel_values" in refused.json["error"]["message"]
    assert not (tmp_path / "run").exists()
