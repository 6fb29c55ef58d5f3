"""The command line `srwm-rl`: one module per command in `commands`, and the packages that carry the commands out."""
