"""What the compiler made of a training step, and what is predicted of it."""
