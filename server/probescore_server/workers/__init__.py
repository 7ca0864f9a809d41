"""Worker processes: what runs in one, and the front process's end of it."""
