"""Whether a model fits, for how many people, and how fast: formulas, with the numbers that go into them. The simulator has the details."""
