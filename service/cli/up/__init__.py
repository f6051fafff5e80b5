"""`blastdoor up`: everything on one machine, in the foreground. The one place in `service` that starts processes."""

from service.cli.up.command import up

__all__ = ["up"]
