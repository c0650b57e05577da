"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on models that are loaded already.

The harness is asked through its public functions, `TaskManager` and `simple_evaluate`, and is imported only here.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

from moefication_cli.errors import ConfigError, UnavailableError, first_line

_BOOTSTRAPS = 1000  # for standard errors of metrics over a whole corpus


def require_harness() -> None:
    """Raises UnavailableError, saying how to install it, where the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UnavailableError("--lm-eval needs the package lm-eval", "pip install 'moefication[eval]'")


def find_tasks(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's TaskManager that knows these tasks, groups or tags.

    The 14,000 that come with the harness take half a minute to list, so they are looked at only where `include_path` does not
    have all. Raises ConfigError for a name that is not there.
    """
    from lm_eval.tasks import TaskManager

    missing = list(names)
    for defaults in (False, True):
        if not defaults and include_path is None:
            continue
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        missing = [name for name in names if not manager.match_tasks([name])]
        if not missing:
            return manager
    where = "lm-evaluation-harness" + ("" if include_path is None else f" and {include_path}")
    raise ConfigError(f"--lm-eval: {where} has no task {missing[0]!r}", "lm-eval ls tasks shows those there are")


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[tuple[str, str], dict[str, Any]]:
    """{(task, metric): value, stderr (None where there is none), examples} of one model; a metric is `name` or `name,filter`.

    Raises ConfigError where the harness cannot run the tasks (data that is not there, a wrong task file).
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            wrapped, tasks=list(names), task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False,
            bootstrap_iters=_BOOTSTRAPS, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ImportError, AssertionError) as error:
        raise ConfigError(f"lm-evaluation-harness: {type(error).__name__}: {first_line(error)}") from error
    assert found is not None
    counts = found.get("n-samples", {})
    values: dict[tuple[str, str], dict[str, Any]] = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            stderr = metrics.get(f"{name}_stderr,{kind}")
            values[task, name if kind == "none" else key] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) else None,
                "examples": counts.get(task, {}).get("effective"),
            }
    return values
