"""What checks and what measures preforkd."""
