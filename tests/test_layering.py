"""The architecture as a test: imports point left only, each heavy dependency has one home, `--help` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moefication_cli"
# Bottom to top. A package imports from itself and from lower levels; packages of one level do not know each other.
LEVELS = (
    ("errors", "cgroups"),
    ("config",),
    ("ffn", "compiled"),  # the data all tensor code shares: the weights of a layer; where compiled kernels are kept
    ("split", "routing", "store", "tasks"),
    ("runtime",),
    ("models",),
    ("runs",),
    ("conversion",),
    ("training", "evaluation", "export"),
    ("benchmark",),  # measures what others make
    ("stages",),
    ("cli",),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
HOMES = {
    "typer": {"cli"},
    "rich": {"cli"},
    "transformers": {"models", "tasks", "training"},
    "datasets": {"tasks"},
    "accelerate": {"models", "training"},
    "peft": {"training"},
    "pymetis": {"split"},
    "k_means_constrained": {"split"},
    "ortools": {"split"},
    "numba": {"runtime", "split", "compiled"},
    "llvmlite": {"runtime", "compiled"},
    "triton": {"runtime"},
    "fmoe": {"runtime"},
    "matplotlib": {"evaluation"},
    "gguf": {"export"},
    "llama_cpp": {"export", "benchmark"},
    "lm_eval": {"evaluation"},
    "openvino": {"benchmark"},
    "nncf": {"benchmark"},
    "click": set(),
    "pickle": {"models", "split"},  # the name of the error torch.load raises, nothing else
}


def imports(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node.lineno))
            if node.module == "moefication_cli":
                found += [(f"moefication_cli.{alias.name}", node.lineno) for alias in node.names]
    return found


def violations(path: Path, package: str) -> list[str]:
    bad = []
    for name, line in imports(path):
        top, _, rest = name.partition(".")
        if top == "moefication_cli" and rest:
            target = rest.split(".")[0]
            if target != package and target in LEVEL and LEVEL[target] >= LEVEL[package]:
                bad.append(f"{path.name}:{line}: {package} imports {target}")
        elif top in HOMES and package not in HOMES[top]:
            bad.append(f"{path.name}:{line}: {package} imports {top}")
    return bad


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    package = relative.parts[0].removesuffix(".py")
    if package in ("__init__", "__main__"):
        return
    assert not violations(path, package)


def test_a_wrong_import_is_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import transformers\nfrom moefication_cli.cli import app\nfrom moefication_cli import stages\n")
    assert len(violations(wrong, "split")) == 3


def test_no_module_is_too_long() -> None:
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; import moefication_cli.cli.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
