"""finetune: train the converted model, selection in the loop, against the dense one. Reads RUN/model's options, not its files.

`apply --finetuned NAME` writes RUN/model from the result. The conversion is made again from the options that RUN/model
records (its refined plans are kept in RUN/refined), so that writing the fine-tuned model over it makes nothing stale.
"""

import importlib.util
from dataclasses import replace

from moefication_cli.config import ApplyConfig, FinetuneConfig, compared_values
from moefication_cli.conversion.plan import check_budget, choose_router, routed_layers
from moefication_cli.conversion.search import PlanInputs, fraction_for, make_plans, refined_stage, require_trainable
from moefication_cli.errors import UnavailableError
from moefication_cli.export.write import check_hostable
from moefication_cli.runs.control import Control, Result
from moefication_cli.runs.costs import finetune_cost
from moefication_cli.runs.data import calibration_data
from moefication_cli.runs.estimate import estimate
from moefication_cli.runs.inputs import begin_options, open_model
from moefication_cli.runs.room import check_room
from moefication_cli.store import jsonio
from moefication_cli.store.artifact import Artifact
from moefication_cli.store.rundir import RunDir

_ROW = ("train", "steps", "tokens", "kl_before", "kl_after", "kept", "ffn_flops_fraction_before", "ffn_flops_fraction")


def finetune(
    run: RunDir,
    config: FinetuneConfig = FinetuneConfig(),
    control: Control = Control(),
    conversion: ApplyConfig | None = None,
) -> Result:
    """Train on the calibration data; writes RUN/finetuned/NAME.

        finetune(RunDir("RUN"), FinetuneConfig(steps=100))

    `conversion` is what to start from; by default what RUN/model was made with. A killed training goes on at its last
    checkpoint. Raises MissingArtifactError (no RUN/model), StaleArtifactError, ConfigError (a conversion that cannot be
    trained, too little data), UnavailableError (no peft), NonFiniteError.
    """
    model = open_model(run, None, control)
    like = conversion or _conversion_of_model(run)
    like = replace(
        like.hosted(), router=choose_router(run, like.router), embed_code=False, finetuned=None, weights=None
    )
    require_trainable(like)
    if config.train == "lora":
        _require_peft()
    router_stage = f"router/{like.router}"
    stages: dict[str, Artifact | None] = {name: run.require(name) for name in ("split", router_stage, "activations")}
    split, router, activations = (stages[name] for name in ("split", router_stage, "activations"))
    assert split is not None and router is not None and activations is not None
    tokens = [layer["tokens"] for layer in activations.metrics["layers"]]
    inputs = PlanInputs(run, model, routed_layers(model, split, router, tokens), stages, control)
    calibration_data(run, model, activations)  # raises where it changed
    cost = finetune_cost(model, config)
    if control.dry_run:
        return estimate("finetune", model, run.path(f"finetuned/{config.name}"), cost, stages)
    if conversion is not None and like.target_kl is not None:
        like = replace(like, fraction=fraction_for(inputs, like))
    check_budget(inputs.layers, activations, inputs.budget(like))
    plans = None
    if like.refine:
        plans = make_plans(inputs, like)
        stages = stages | {refined_stage(like): run.read_stage(refined_stage(like))}
    digests = {"conversion": jsonio.digest(jsonio.plain(compared_values(like)))}
    with run.begin(f"finetuned/{config.name}", begin_options(config, control, model, stages, digests)) as work:
        check_room(work, model, cost, control, "--train router or fewer --tokens")
        manifest = work.manifest
        if not work.up_to_date:
            from moefication_cli.training.finetune import finetune_model
            from moefication_cli.training.finetuned_files import write_finetuned

            plans = plans or make_plans(inputs, like)
            if like.host is not None:
                check_hostable(like.host, model.checkpoint.config.to_dict(), plans)
            made = finetune_model(inputs, plans, like, config, work.scratch)
            write_finetuned(work.folder, made.plans, made.weights, like, run.info.ffn)
            manifest = work.finish(made.metrics)
    assert manifest is not None
    row = {name: manifest.metrics[name] for name in _ROW}
    payload = {
        "name": config.name,
        "digest": manifest.digest,
        "metrics": dict(manifest.metrics),
        "seconds": manifest.seconds,
        "kept": row["kept"],
    }
    return Result("finetune", [row], payload, up_to_date=work.reason is None, notes=[_note(run, config, row["kept"])])


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UnavailableError(
            "--train lora needs the package peft, which is not installed",
            "pip install 'moefication[lora]', or use --train ffn",
        )


def _note(run: RunDir, config: FinetuneConfig, kept: bool) -> str:
    if kept:
        return f"KL is on held-out calibration data; `moefication apply {run.root} --finetuned {config.name}` writes RUN/model"
    return (
        "training did not lower the KL on held-out calibration data, nothing of it is kept: try more --steps, a smaller "
        "--learning-rate, another --train, or collect more data"
    )


def _conversion_of_model(run: RunDir) -> ApplyConfig:
    """The options RUN/model was made with; a fine-tuned one need not be up to date, only what it was converted from."""
    made = run.read_stage("model")
    like = ApplyConfig.recorded(made.config)
    if like.finetuned is None:
        run.require("model")
    return like
