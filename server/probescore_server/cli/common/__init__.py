"""Contains the code that all commands of the command line share: the connection to a server, consoles, streams, failures, interruption and
progress.
"""
