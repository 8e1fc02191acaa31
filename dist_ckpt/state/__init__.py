"""What a training run is made of: named parts, each of tensors and plain values."""
