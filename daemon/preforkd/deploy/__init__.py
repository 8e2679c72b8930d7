"""``preforkd deploy``: what is shipped for systemd, supervisord and Prometheus, fitted to settings."""
