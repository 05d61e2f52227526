"""The operations of a step in Triton: the same modules, functions and signatures as in reference/."""
