"""The kinds of routers by name: one file each, and one line in `ROUTERS`.

A kind's name also stands among the choices of `config.RouterConfig.router`; a test holds both together.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moefication_cli.errors import ConfigError
from moefication_cli.routing.router import Router
from moefication_cli.routing.routers import linear, mlp, native, random, regression, similarity
from moefication_cli.routing.training import RouterKind

ROUTERS: dict[str, RouterKind] = {
    "regression": regression.REGRESSION,
    "mlp": mlp.MLP,
    "linear": linear.LINEAR,
    "quadratic": regression.QUADRATIC,
    "native": native.NATIVE,
    "similarity": similarity.SIMILARITY,
    "random": random.RANDOM,
}


def router_kind(name: str) -> RouterKind:
    """The kind of that name. Raises ConfigError naming those there are."""
    if name not in ROUTERS:
        raise ConfigError(f"there is no router {name!r}", f"use one of {', '.join(ROUTERS)}")
    return ROUTERS[name]


def router_settings(router: Router) -> dict[str, Any]:
    """What is stored of a router besides its tensors; the usual form is not named, as in folders of earlier versions."""
    named = {} if router.form == "two_layer" else {"form": router.form}
    return named | router.settings()


def read_router(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], num_experts: int) -> Router:
    """A router from its tensors and what `router_settings` made. Raises ConfigError for what does not fit together."""
    forms = {kind.form.form: kind.form for kind in ROUTERS.values()}
    form = settings.get("form", "two_layer")
    if form not in forms:
        raise ConfigError(f"there is no router of the form {form!r}", f"this version knows {', '.join(forms)}")
    return forms[form].read(tensors, settings, num_experts)
