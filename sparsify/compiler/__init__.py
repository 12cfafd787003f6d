"""A recipe and a model become a plan; the plan becomes a checkpoint directory."""
