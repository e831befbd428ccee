"""Everything that touches a file, a process or a network: the DVC stages and what they are made of."""
