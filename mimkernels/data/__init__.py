"""Images and the batches made of them. Nothing heavy is imported here."""

# Most pixels of an image file. So many take up to 1.6 GB in the process that reads them.
MAX_PIXELS = 100_000_000
