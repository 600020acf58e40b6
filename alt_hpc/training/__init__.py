"""The optimisation of a model over DeepSpeed. Knows nothing of runs or clusters."""
