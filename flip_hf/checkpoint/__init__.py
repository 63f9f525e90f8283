"""What guards and describes a saved model."""
