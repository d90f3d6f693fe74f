"""Many ways to make one model smaller, each evaluated, from one calibration run."""
