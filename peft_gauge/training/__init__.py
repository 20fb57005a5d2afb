"""Models, fine-tuning methods, batches and the training step."""
