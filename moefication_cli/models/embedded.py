"""The name that code written into converted folders imports (`apply --embed-code`): it must stay, whatever moves."""

from moefication_cli.models.folder.embedded import attach

__all__ = ["attach"]
