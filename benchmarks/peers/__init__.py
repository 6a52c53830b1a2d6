"""The same federated run in other systems, as their users would write it; each is run by an interpreter of its own."""
