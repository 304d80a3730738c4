"""Many simulated runs of one trace: sweeps over settings, and plans for what to deploy."""
