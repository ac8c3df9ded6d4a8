"""The command line."""

from attnpress.cli.parser import build_parser, main

__all__ = ["build_parser", "main"]
