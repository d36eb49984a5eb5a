"""What a stage will need, known before it runs: memory by simulation, disk and time by counting, and what to change."""
