"""What `srwm-rl bench` times, one file per kind."""
