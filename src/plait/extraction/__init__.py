"""Base + full fine-tune → adapter."""
