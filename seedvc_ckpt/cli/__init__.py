"""The command ``seedvc-ckpt``: each command is one call of the library and its printing."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from seedvc_ckpt.errors import CheckpointError

__all__ = ["main"]

_COMMANDS = [
    "ls", "latest", "show", "verify", "diff", "prune", "pin", "unpin", "rewind", "gc", "doctor", "copy", "export",
    "check-deploy",
]  # fmt: skip


class _Commands(click.Group):
    """Imports a command's module when it is called: listing must not wait for what exporting needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return _COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command
        return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: seedvc-ckpt export runs/my_run --config config_dit_mel_seed_uvit_whisper_base_f0_44k.yml",
)
@click.version_option(package_name="seedvc-ckpt", prog_name="seedvc-ckpt")
def commands() -> None:
    """List, verify, compare, prune, rewind and export training checkpoints.

    RUN is a run's folder or URL, FILE one checkpoint. Commands exit with 0 when all is well, 1 when the answer is bad
    news, and 2 when the call was wrong.
    """


def main() -> None:
    """Run the command and exit."""
    try:
        sys.exit(commands.main(standalone_mode=False, prog_name="seedvc-ckpt"))
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (CheckpointError, ValueError) as error:
        click.echo(f"{click.style('error:', fg='red')} {error}", err=True)
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"{click.style('error:', fg='red')} {place}{error.strerror}", err=True)
        sys.exit(1)
