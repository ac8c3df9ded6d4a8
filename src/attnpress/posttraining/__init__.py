"""Post-training quantization: from a model and some texts to a compressed model, without labels and training."""

from attnpress.posttraining.run import Quantized, QuantizeSpec, quantize

__all__ = ["QuantizeSpec", "Quantized", "quantize"]
