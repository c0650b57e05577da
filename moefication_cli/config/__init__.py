"""Every option's name, type, default, bounds and help, once.

One frozen dataclass per command. `cli/options.py` turns a dataclass into Typer options; the library takes the same
dataclasses, which check themselves (`option.Options`). Lists are tuples here and comma lists on the command line.
Imports nothing heavy, so `--help` stays instant.
"""

from moefication_cli.config.option import (
    LAYERS,
    Options,
    compared_values,
    option,
    options_of,
    recorded_values,
    same_option,
)
from moefication_cli.config.relufy import RelufyConfig
from moefication_cli.config.stages import (
    ApplyConfig,
    CollectConfig,
    ControlConfig,
    DataConfig,
    EvalConfig,
    FormatName,
    GraphConfig,
    ModelConfig,
    RouterConfig,
    RunModelConfig,
    Score,
    SplitConfig,
    TaskConfig,
    TaskName,
)
from moefication_cli.config.tools import (
    BenchConfig,
    CleanConfig,
    DemoConfig,
    ExportConfig,
    FinetuneConfig,
    ReportConfig,
    RunConfig,
    StatusConfig,
    TuneConfig,
)

__all__ = [
    "LAYERS", "ApplyConfig", "BenchConfig", "CleanConfig", "CollectConfig", "ControlConfig", "DataConfig", "DemoConfig",
    "EvalConfig", "ExportConfig", "FinetuneConfig", "FormatName", "GraphConfig", "ModelConfig", "Options", "RelufyConfig",
    "ReportConfig", "RouterConfig", "RunConfig", "RunModelConfig", "Score", "SplitConfig", "StatusConfig", "TaskConfig",
    "TaskName", "TuneConfig", "compared_values", "option", "options_of", "recorded_values", "same_option",
]  # fmt: skip
