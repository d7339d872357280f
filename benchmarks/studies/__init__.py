"""What ``python -m benchmarks study`` is made of: plan, cells, claims and page."""
