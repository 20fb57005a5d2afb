"""What a training step will need, worked out without the device."""
