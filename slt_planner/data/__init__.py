"""Images as tensors, and their split over clients."""
