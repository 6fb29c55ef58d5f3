"""What stands behind `srwm-rl train`: from settings to a run that can be stopped, resumed and trusted."""
