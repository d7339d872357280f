"""The subcommands of ``mimkernels``, a folder each."""
