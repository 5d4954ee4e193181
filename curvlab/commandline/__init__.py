"""What the commands share: options made of a config, errors in one sentence, exit codes, the console."""
