"""What can go wrong after training has begun. Bad arguments are ValueError, raised before any file is written."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to do next."""
