"""Image files to checked pixels to tars to batches."""
