"""What ranks hold and who writes what, as pure values; torch's DCP describes the tensors."""
