"""The code in a converted folder where this package cannot be imported: bit for bit the `reference` backend."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from converted import convert
from safetensors.torch import load_file, save_file
from tiny_models import tiny_inputs

from moefication_cli.models.folder.checkpoint import Checkpoint
from moefication_cli.models.folder.embedded import embed_code
from moefication_cli.models.folder.seal import sealed
from moefication_cli.models.loading import load

AUTO = {
    "llama": "AutoModelForCausalLM", "phi3": "AutoModelForCausalLM", "gpt2": "AutoModelForCausalLM", "opt": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForSequenceClassification", "bart": "AutoModelForSeq2SeqLM",
}  # fmt: skip

# Runs where no path leads to the package: -I leaves the working directory and PYTHONPATH out, and an import is refused
SCRIPT = """
import sys
sys.modules["moefication_cli"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
for name, auto in {auto!r}.items():
    folder = {root!r} + "/" + name + "/moe"
    try:
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    except Exception as error:
        print(name, type(error).__name__, error)
        continue
    inputs = load_file({root!r} + "/" + name + "/inputs.safetensors")
    with torch.no_grad():
        found = {{"logits": model(**inputs).logits.contiguous()}}
        model.save_pretrained(folder + "-again")
        again = getattr(transformers, auto).from_pretrained(folder + "-again", trust_remote_code=True)
        found["again"] = again(**inputs).logits.contiguous()
        if name == "llama":
            twin = __import__("copy").deepcopy(model)
            found["copied"] = twin(**inputs).logits.contiguous()
            found["generated"] = model.generate(**inputs, max_new_tokens=4, pad_token_id=0)
    save_file(found, {root!r} + "/" + name + "/found.safetensors")
"""


def without_the_package(root: Path, names: list[str]) -> str:
    code = SCRIPT.format(auto={name: AUTO[name] for name in names}, root=str(root))
    environment = {
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_reference_backend_bit_for_bit(tmp_path: Path) -> None:
    """Padded batches, a layer without a router, compensation; all families in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in AUTO:
        torch.manual_seed(0)
        (tmp_path / name).mkdir()
        convert(name, tmp_path / name / "moe", top_k=2, extra=True, pruned=(1,), shared=12)
        embed_code(tmp_path / name / "moe")
        save_file(tiny_inputs(name), tmp_path / name / "inputs.safetensors")
    said = without_the_package(tmp_path, list(AUTO))
    assert said == ""
    for name in AUTO:
        found, inputs = load_file(tmp_path / name / "found.safetensors"), tiny_inputs(name)
        model = load(tmp_path / name / "moe", device="cpu", backend="reference")
        with torch.no_grad():
            expected = model(**inputs).logits
            dense = load(tmp_path / name / "moe", device="cpu", fraction=1.0)(**inputs).logits
        assert torch.equal(found["logits"], expected), name
        assert not torch.allclose(found["logits"], dense, atol=1e-3), name  # the control: it is not the dense model
        # What was saved there: the same mixture by its own code, with the package, and sealed as the package seals
        saved = tmp_path / name / "moe-again"
        assert torch.equal(found["again"], expected), name
        with torch.no_grad():
            assert torch.equal(load(saved, device="cpu", backend="reference", verify=True)(**inputs).logits, expected)
        settings, config = (
            json.loads((saved / file).read_text()) for file in ("moefication/moefication.json", "config.json")
        )
        assert settings["weights"] == sealed(Checkpoint(saved)) and len(settings["weights"]["ffns"]) == len(
            settings["layers"]
        )
        assert config == json.loads((tmp_path / name / "moe" / "config.json").read_text())
        if name == "llama":
            assert torch.equal(found["copied"], expected)
            assert torch.equal(found["generated"], model.generate(**inputs, max_new_tokens=4, pad_token_id=0))
    torch.set_num_threads(threads)


def test_damage_is_refused(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "opt"):
        (tmp_path / name).mkdir()
        convert(name, tmp_path / name / "moe", top_k=2)
        embed_code(tmp_path / name / "moe")
    routers = tmp_path / "llama" / "moe" / "moefication" / "routers.safetensors"
    routers.write_bytes(routers.read_bytes()[:-4] + b"\0\0\0\1")
    (tmp_path / "gpt2" / "moe" / "moefication" / "moefication.json").unlink()
    weights = tmp_path / "opt" / "moe" / "model.safetensors"
    save_file({**load_file(weights), "more": torch.zeros(1)}, weights, {"format": "pt"})
    said = without_the_package(tmp_path, ["llama", "gpt2", "opt"]).splitlines()
    assert [line.split()[:2] for line in said] == [
        ["llama", "CorruptArtifactError"], ["gpt2", "MissingArtifactError"], ["opt", "CorruptArtifactError"]
    ]  # fmt: skip
    assert "was altered" in said[0] and "are missing" in said[1] and "not the one the experts were made for" in said[2]
