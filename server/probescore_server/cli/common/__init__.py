"""What all commands share: the server they talk to, consoles and streams, failures, interruption and progress."""
