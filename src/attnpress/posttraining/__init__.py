"""Post-training quantization: compress a model with texts alone, without labels or training."""

from attnpress.posttraining.run import Quantized, QuantizeSpec, quantize

__all__ = ["QuantizeSpec", "Quantized", "quantize"]
