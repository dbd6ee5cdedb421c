"""One file for each task. A new task is a new file with a ``register_task`` class; nothing else."""
