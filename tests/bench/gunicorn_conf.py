"""gunicorn's settings in the benchmark. Names that an older gunicorn does not know are ignored by it."""

bind = "127.0.0.1:0"
worker_class = "sync"
backlog = 1024
control_socket_disable = True  # preforkd has none here either; and it is a file in the home directory
