"""Storage formats of quantized checkpoints: how codes and grids lie in the files."""
