"""qresafe measures and repairs the loss of refusals in quantized chat models."""

__version__ = "0.1.0"
