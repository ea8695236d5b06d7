"""Programs that read a prompt and go on with it, each in a process of its own."""
