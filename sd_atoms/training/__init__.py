"""Training a concept: settings, the objective, one flat loop, checkpoints and the run folder."""
