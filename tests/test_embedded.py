"""Code in a converted folder: every auto class gives the mixture to those who trust it, and the dense model to others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from converted import convert
from tiny_models import tiny_inputs

from moefication_cli.models.folder.embedded import embed_code
from moefication_cli.models.folder.moe_folder import read_moe_folder
from moefication_cli.models.loading import load
from moefication_cli.models.surgery import installed_layers

# an auto class -> the class it loads; there are more, which are tried as well
SOME = {
    "llama": {"AutoModel": "LlamaModel", "AutoModelForSequenceClassification": "LlamaForSequenceClassification"},
    "t5": {"AutoModel": "T5Model", "AutoModelForTextEncoding": "T5EncoderModel"},
    "bart": {"AutoModelForSeq2SeqLM": "BartForConditionalGeneration", "AutoModelForCausalLM": "BartForCausalLM"},
    "bert": {"AutoModel": "BertModel", "AutoModelForMaskedLM": "BertForMaskedLM"},
    "falcon": {"AutoModel": "FalconModel", "AutoModelForCausalLM": "FalconForCausalLM"},
}


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`embedded(name)` -> a converted folder with code."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(name: str) -> Path:
        torch.manual_seed(0)
        convert(name, tmp_path / "moe", top_k=1)
        embed_code(tmp_path / "moe")
        return tmp_path / "moe"

    return make


@pytest.mark.parametrize("name", sorted(SOME))
def test_every_auto_class_gives_the_mixture(name: str, embedded: Any) -> None:
    folder = embedded(name)
    names = [layer.name for layer in read_moe_folder(folder).layers]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert SOME[name].items() <= {auto: entry.partition(".MoE")[2] for auto, entry in auto_map.items()}.items()
    for auto in set(auto_map) - {"AutoModelForMultipleChoice"}:  # whose head does not fit the stored one
        trusted = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
        plain = getattr(transformers, auto).from_pretrained(folder)
        assert type(trusted).__name__ == f"MoE{type(plain).__name__}" and not installed_layers(plain)
        found = list(installed_layers(trusted))
        # Encoders and decoders alone have the experts of their own layers
        assert found and found == [name for name in names if name in found]
        assert (
            found == names or auto in ("AutoModelForTextEncoding", "AutoModelForTokenClassification") or name == "bart"
        )


def test_the_bare_model_computes_what_it_computes_inside_the_whole_one(embedded: Any) -> None:
    folder, inputs = embedded("llama"), tiny_inputs("llama", padded=False)
    with torch.no_grad():
        whole = load(folder, device="cpu").model(**inputs).last_hidden_state
        trusted, plain = (
            transformers.AutoModel.from_pretrained(folder, trust_remote_code=trust)(**inputs).last_hidden_state
            for trust in (True, False)
        )
    assert torch.allclose(trusted, whole, atol=1e-5)
    assert not torch.allclose(plain, whole, atol=1e-2)  # negative control
