"""Shared parts of the commands: options from a config, errors in one sentence, exit codes, and the console."""
