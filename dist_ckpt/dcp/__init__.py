"""What is planned with torch.distributed.checkpoint, the only room that knows it."""
