"""What stands beside supervisord (``preforkd supervisor listener``), or in it and in supervisorctl."""
