"""A model's accuracy on lm-eval's tasks, and how far its distributions are from BF16's."""
