"""Training over several processes: what they tell each other, how the model is split over them, and checkpoints that cross."""
