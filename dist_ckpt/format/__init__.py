"""The stored formats, bytes to values and back, without I/O; the texts are in docs/spec."""
