"""From the fields of a call to a generation, and from there to what its client reads; shared by all APIs."""
