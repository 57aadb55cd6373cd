"""What leaves the run: pruning, quantisation-aware training and distillation of a model while it trains."""
