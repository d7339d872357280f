"""What ``python -m benchmarks gpu`` does on a device, stage by stage; each runs in a process of its own."""
