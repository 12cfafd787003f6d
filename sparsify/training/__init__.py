"""Recovery: training what compression left over. `trainable` is the linear that every method here trains."""
