"""From a task's name, a tokenizer, a model's configuration and rows to `Examples`: the one door stages use."""

from typing import Any

from moefication_cli.config import TaskName
from moefication_cli.tasks.classification import ClassificationExamples
from moefication_cli.tasks.embedding import EmbeddingExamples
from moefication_cli.tasks.examples import Examples, TaskOptions
from moefication_cli.tasks.language import LanguageExamples
from moefication_cli.tasks.masked import MaskedExamples
from moefication_cli.tasks.reading import Rows
from moefication_cli.tasks.text2text import Text2TextExamples


def prepare(
    task: TaskName,
    tokenizer: Any,
    model_config: Any,
    rows: Rows,
    options: TaskOptions | None = None,
    *,
    require_labels: bool = True,
) -> Examples:
    """The examples of a task. `require_labels=False` is for calibration, which reads labels only if text2text has them.

    `Examples.notes` are sentences for the user about what was guessed, beside `rows.notes`. Raises ConfigError for
    fields, labels, prompts and lengths that do not fit the model.
    """
    options = options or TaskOptions()
    if task == "classification":
        return ClassificationExamples(tokenizer, model_config, rows, options, require_labels)
    if task == "text2text":
        return Text2TextExamples(tokenizer, model_config, rows, options, require_labels)
    if task == "embedding":
        return EmbeddingExamples(tokenizer, model_config, rows, options, require_labels)
    if task == "mlm":
        return MaskedExamples(tokenizer, model_config, rows, options)
    return LanguageExamples(tokenizer, model_config, rows, options)
