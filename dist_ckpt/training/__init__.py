"""What a training loop tells and asks: when a save is due, what is best, where to go on."""
