"""What a run did with its time, from the spans of its ranks."""
