"""What a step is made of beside its window: the stepper puts these together, and none of them knows it."""
