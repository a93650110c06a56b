"""The edges where record batches are stored: Kafka, or rotated files."""
