"""Groups of runs that differ only in their seed: training them, their progress and their summary."""
