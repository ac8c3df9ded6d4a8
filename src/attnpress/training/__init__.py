"""Calibration and training of bound models: thresholds, sparsity step by step, the one Trainer."""
