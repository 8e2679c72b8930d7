"""What runs inside a mold or a worker. Nothing in here imports ``preforkd``, the master's package."""
