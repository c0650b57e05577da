"""eval --lm-eval: the dense model and RUN/model on tasks of lm-evaluation-harness, into RUN/harness/NAME/metrics.json."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moefication_cli.config import EvalConfig
from moefication_cli.errors import ConfigError
from moefication_cli.evaluation.harness import find_tasks, require_harness, run_tasks
from moefication_cli.models.folder.contents import tokenizer_digest
from moefication_cli.models.loading import load, load_model
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.inputs import RunModel, absolute, begin_options, open_model
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir


def harness(run: RunDir, config: EvalConfig, control: Control = Control()) -> Result:
    """Run `config.lm_eval` on both models, one after the other; rows `{task, metric, dense, moe, ...}`.

    Data that the tasks load is not looked at for freshness; the files in `include_path` are. Raises UnavailableError
    (lm-eval is not installed), ConfigError (unknown task, data not there), MissingArtifactError (no RUN/model).
    """
    require_harness()
    assert config.lm_eval is not None
    if config.data is not None:
        raise ConfigError("--lm-eval brings its own data", "leave --data out, or run eval twice")
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise ConfigError(f"--include-path {config.include_path} is not a folder")
    model = open_model(run, None, control)
    converted = run.require("model")
    place = run.path(f"harness/{config.name}")
    if control.dry_run:
        return Result("eval", [], {"dry_run": True}, notes=[f"would run {', '.join(config.lm_eval)} into {place}"])
    folder = model.checkpoint.source.folder
    digests = {"tasks": _tasks_digest(config), "tokenizer": tokenizer_digest(folder, run.hashes.sha256)}
    options = begin_options(config, control, model, {"model": converted}, digests)
    with run.begin(f"harness/{config.name}", options) as work:
        if work.up_to_date:
            metrics = jsonio.read_object(place / "metrics.json")
        else:
            metrics = _measure(model, converted, run.info.task, config, control)
            jsonio.write(work.folder / "metrics.json", metrics)
            work.finish({"rows": len(metrics["rows"])})
    shown = ("task", "metric", "dense", "moe", "dense_stderr", "moe_stderr", "examples")
    table = [{name: row[name] for name in shown} for row in metrics["rows"]]
    payload = metrics | {"table": table, "metrics_path": str(place / "metrics.json")}
    notes = [f"lm-eval {metrics['lm_eval']}; moe is RUN/model; numbers: {place / 'metrics.json'}"]
    return Result("eval", table, payload, work.reason is None, notes)


def _measure(
    model: RunModel, converted: Artifact, task: str | None, config: EvalConfig, control: Control
) -> dict[str, Any]:
    tasks = config.lm_eval or ()
    manager = find_tasks(tasks, absolute(config.include_path))
    options: dict[str, Any] = {"task": task, "device": model.device, "dtype": config.dtype}
    options["trust_remote_code"] = control.trust_remote_code

    def results(net: Any) -> dict[tuple[str, str], dict[str, Any]]:
        return run_tasks(
            net, words, tasks, manager, num_fewshot=config.num_fewshot, limit=config.limit,
            batch_size=config.batch_size, seed=control.seed,
        )  # fmt: skip

    control.say("lm-eval: the dense model")
    loaded = load_model(model.checkpoint.source.folder, quiet=True, **options)
    words = loaded.tokenizer
    of_dense = results(loaded.model)
    del loaded  # one model in memory at a time
    control.say("lm-eval: RUN/model")
    of_moe = results(load(converted.path, backend=config.backend, **options))
    rows = []
    for (task_name, metric), dense in of_dense.items():
        moe = of_moe[task_name, metric]
        rows.append(
            {"task": task_name, "metric": metric, "dense": dense["value"], "moe": moe["value"],
             "difference": moe["value"] - dense["value"], "dense_stderr": dense["stderr"], "moe_stderr": moe["stderr"],
             "examples": dense["examples"]}
        )  # fmt: skip
    return {
        "schema": "moefication/harness@1",
        "model": str(model.checkpoint.source.ref),
        "tasks": list(tasks),
        "num_fewshot": config.num_fewshot,
        "device": str(model.device),
        "lm_eval": version("lm-eval"),
        "rows": rows,
    }


def _tasks_digest(config: EvalConfig) -> str:
    """Of what was asked for, and of the files in `include_path`."""
    asked = f"{config.lm_eval} {config.num_fewshot} {version('lm-eval')}"
    digest = hashlib.sha256(asked.encode())
    if config.include_path is not None:
        root = Path(config.include_path)
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(f"\n{path.relative_to(root)} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
