"""What other libraries' models get from this one."""
