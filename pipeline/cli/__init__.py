"""The console command `vdvae`: words alone; what they do is in pipeline/commands and below."""

from pipeline.cli.main import main

__all__ = ["main"]
