"""What is trained: models, methods, batches, and the step."""
