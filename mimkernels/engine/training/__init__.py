"""The training loop and what surrounds it: settings, checkpoints to continue from, validation, history."""
