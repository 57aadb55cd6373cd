"""commpress to run: the training program, the demo, the report and the `commpress` command."""
