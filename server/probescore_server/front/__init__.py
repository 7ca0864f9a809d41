"""The front process: the port, what crosses it, and what is said of it. It never imports torch."""
