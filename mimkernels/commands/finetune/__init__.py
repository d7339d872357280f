"""Fine-tuning of a pre-trained encoder."""
