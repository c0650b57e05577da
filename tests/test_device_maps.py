"""A mixture of experts that accelerate has spread over devices: with one device at hand, over memory and disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Runner
from converted import convert
from test_loaded_model import real_logits
from tiny_models import save_tiny

from moefication_cli import load
from moefication_cli.errors import UnsupportedModelError
from moefication_cli.models import loading
from moefication_cli.models.loading import load_model
from moefication_cli.models.sites import find_sites
from moefication_cli.models.surgery import install, installed_layers, is_installed
from moefication_cli.runs import data as run_data

BLOCKS = {"llama": "model.layers", "phi3": "model.layers", "bert": "bert.encoder.layer", "gpt2": "transformer.h"}


def placed(model: Any, name: str, devices: tuple[str, str]) -> dict[str, str]:
    """A device_map that puts the two layers where `devices` say, and everything else on the CPU."""
    layers = {f"{BLOCKS[name]}.{index}": device for index, device in enumerate(devices)}
    leaves = [path for path, module in model.named_modules() if not list(module.children())]
    return {path: "cpu" for path in leaves if not path.startswith(BLOCKS[name])} | layers


@pytest.mark.parametrize("devices", [("cpu", "disk"), ("disk", "cpu")])
@pytest.mark.parametrize("name", BLOCKS)
def test_layers_in_memory_and_on_disk(name: str, devices: tuple[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    convert(name, tmp_path / "moe", top_k=2, extra=True, pruned=(1,))
    whole = load(tmp_path / "moe", device="cpu")
    model = load(tmp_path / "moe", device_map=placed(whole, name, devices), offload_folder=tmp_path / "off")
    on_disk = find_sites(load_model(tmp_path / "moe", device="cpu", quiet=True).model)[devices.index("disk")]
    with torch.no_grad():
        expected = real_logits(whole, name)
        for _ in range(2):
            assert torch.equal(real_logits(model, name), expected)
        # What lies on disk is given back after each call: parameters, and the views that the experts had of them
        assert model.get_parameter(f"{on_disk.down}.weight").is_meta
        assert installed_layers(model)[on_disk.name].weights.ffn.w_up_FD.is_meta
        for options in ({"fraction": 1.0}, {"top_k": 1}, {}):  # the first takes a layer without a router out again
            model.moefication.set(**options)
            whole.moefication.set(**options)
            torch.testing.assert_close(real_logits(model, name), real_logits(whole, name))
        model.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again", device="cpu", verify=True)
        assert torch.equal(real_logits(again, name), expected)
        dense = load(tmp_path / "moe", device="cpu", fraction=1.0)
        assert not torch.allclose(real_logits(dense, name), expected, atol=1e-3)  # the control


def test_one_device_for_everything_changes_nothing(tmp_path: Path) -> None:
    convert("llama", tmp_path / "moe", top_k=2)
    with torch.no_grad():
        expected = real_logits(load(tmp_path / "moe", device="cpu"), "llama")
        for device_map in ("cpu", {"": "cpu"}, "auto"):
            assert torch.equal(real_logits(load(tmp_path / "moe", device_map=device_map), "llama"), expected)


def test_a_layer_cannot_be_torn_apart(tmp_path: Path) -> None:
    convert("llama", tmp_path / "moe", top_k=2)
    whole = load(tmp_path / "moe", device="cpu")
    devices = placed(whole, "llama", ("cpu", "disk"))
    dense = load_model(
        tmp_path / "moe", device="cpu", quiet=True, device_map=devices, offload_folder=tmp_path / "off"
    ).model
    site = find_sites(dense)[0]
    dense.get_submodule(site.down)._hf_hook.execution_device = "cuda:1"  # where a finer map would compute it
    with pytest.raises(UnsupportedModelError, match="several devices: cpu, cuda:1") as refused:
        install(dense, site, installed_layers(whole)[site.name])
    assert "place whole layers" in refused.value.hint and not is_installed(dense, site)


def test_what_something_else_has_wrapped_is_refused(tmp_path: Path) -> None:
    convert("llama", tmp_path / "moe", top_k=2)
    model = load(tmp_path / "moe", device="cpu")
    dense = load_model(tmp_path / "moe", device="cpu", quiet=True).model
    site = find_sites(dense)[0]
    down = dense.get_submodule(site.down)
    down.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="down_proj is wrapped"):
        install(dense, site, installed_layers(model)[site.name])
    assert not is_installed(dense, site)


def test_activations_of_a_model_whose_layers_lie_on_disk(
    run_cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("bert", tmp_path / "bert")
    data = tmp_path / "train.tsv"
    data.write_text("sentence\tlabel\n" + "".join(f"w{n % 40} w{n % 7} w{n % 13}\t{n % 2}\n" for n in range(200)))
    maps: list[Any] = []
    own = loading.load_model

    def on_disk(*args: Any, device_map: Any = None, **options: Any) -> Any:
        if device_map == "auto":  # which this machine's memory would make one device
            maps.append(device_map := placed(model, "bert", ("cpu", "disk")))
        return own(*args, device_map=device_map, **options)

    monkeypatch.setattr(run_data, "load_model", on_disk)
    words = ("--model", tmp_path / "bert", "--data", data, "--device", "cpu")
    digests = [run_cli.ok("collect-activations", tmp_path / name, *words, *more)["digest"]
               for name, more in (("whole", ()), ("disk", ("--offload",)), ("other", ("--seed", 1)))]  # fmt: skip
    assert len(maps) == 1 and digests[0] == digests[1] != digests[2]
    assert not list((tmp_path / "disk").rglob("offload*"))
