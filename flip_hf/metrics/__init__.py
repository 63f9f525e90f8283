"""What click predictions are worth."""
