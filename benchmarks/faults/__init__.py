"""What is left of a job of which a process is killed."""
