"""Format 1: bytes to values and back, without I/O; the normative text is docs/spec/format-v1.md."""
