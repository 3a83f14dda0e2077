"""The command ``seedvc-train``."""

from __future__ import annotations

import sys

import click

from seedvc_ckpt.errors import CheckpointError
from seedvc_train.cli import evaluate, report
from seedvc_train.cli.train import command
from seedvc_train.config import ConfigError

__all__ = ["command", "main"]

command.add_command(evaluate.command)
command.add_command(report.command)


def main() -> None:
    """Run the command and exit."""
    try:
        sys.exit(command.main(standalone_mode=False, prog_name="seedvc-train"))
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ConfigError as error:
        _fail(error, 2)
    except (CheckpointError, OSError) as error:
        _fail(error, 1)
    except (ValueError, RuntimeError) as error:
        if not type(error).__module__.startswith("seedvc_train."):
            raise  # a defect, not a mistake of the user's
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    click.echo(f"{click.style('error:', fg='red')} {error}", err=True)
    sys.exit(code)
