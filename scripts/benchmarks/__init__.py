"""The benchmarks of `srwm-rl bench`, one file for each kind."""
