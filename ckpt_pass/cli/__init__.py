"""The commands."""

from ckpt_pass.cli.commands import main as main
