"""Calibration and training of bound models: thresholds, stepwise sparsity, and the Trainer."""
