"""Search for settings: `srwm-rl tune`."""
