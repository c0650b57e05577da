"""What the help says of each command besides its options: its panel, an example, and what usually comes next."""

from dataclasses import dataclass

_STAGES, _WHOLE, _AFTER, _RUNS = "The six stages", "Whole conversions", "With a converted model", "Looking after runs"


@dataclass(frozen=True)
class Guide:
    """`then` is the command that usually follows, with `{0}` for the run directory (or the model)."""

    panel: str
    example: str
    then: str = ""


GUIDE = {
    "run": Guide(_WHOLE, "run RUN --model MODEL --data calibration.txt --eval-data test.txt --fraction 0.2"),
    "demo": Guide(_WHOLE, "demo artifacts/demo-run"),
    "tune": Guide(_WHOLE, "tune RUN --expert-sizes 4,16,32 --fractions 0.1,0.2,0.3", "apply {0} --fraction 0.2"),
    "relufy": Guide(
        _WHOLE, "relufy OUT --model MODEL --data train.tsv --eval-data dev.tsv", "run RUN --model {0} --data DATA"
    ),
    "inspect": Guide(_WHOLE, "inspect MODEL", "run RUN --model {0} --data DATA"),
    "collect-activations": Guide(
        _STAGES, "collect-activations RUN --model MODEL --data train.tsv", "split {0} --expert-size 4"
    ),
    "build-graph": Guide(_STAGES, "build-graph RUN --neighbours 64", "split {0} --method graph"),
    "split": Guide(_STAGES, "split RUN --method activation --expert-size 4", "train-router {0}"),
    "train-router": Guide(_STAGES, "train-router RUN --router regression", "apply {0} --fraction 0.2"),
    "apply": Guide(_STAGES, "apply RUN --fraction 0.2 --refine 200", "eval {0} --data DATA"),
    "eval": Guide(_STAGES, "eval RUN --data dev.tsv --fractions 0.1,0.2,0.3", "report {0}"),
    "finetune": Guide(_AFTER, "finetune RUN --steps 300 --train ffn"),
    "bench": Guide(_AFTER, "bench RUN --mode prefill --batch 8"),
    "export": Guide(_AFTER, "export RUN --to mixtral --out DIR"),
    "status": Guide(_RUNS, "status RUN"),
    "verify": Guide(_RUNS, "verify RUN"),
    "clean": Guide(_RUNS, "clean RUN split --dry-run"),
    "report": Guide(_RUNS, "report RUN"),
    "runs": Guide(_RUNS, "runs artifacts"),
    "config": Guide(_RUNS, "config RUN"),
}
