"""Memory, time and steps of a training run, computed before it starts."""
