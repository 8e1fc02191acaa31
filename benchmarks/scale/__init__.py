"""What grows with the number of ranks: the real code, and as many ranks as a machine holds."""
