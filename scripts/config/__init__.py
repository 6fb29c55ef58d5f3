"""Settings of a training run, their defaults and presets, and checks of settings read from files."""
