"""What choosing texts costs: planned before anything is spent, and kept within a promised share of the training."""
