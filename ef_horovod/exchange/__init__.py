"""How the messages of all ranks meet, and the channel that takes a vector through a step."""
