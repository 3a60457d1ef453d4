"""How a network runs where nothing is trained."""
